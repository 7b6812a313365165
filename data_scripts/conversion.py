"""Many image files to pixels of one size: in parallel, a part at a time on disk, so that a killed script goes on."""

import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sources import fingerprint
from tqdm import tqdm

from mocolayers.data.folders import clear, held
from mocolayers.runtime import DatasetError, atomic_write

PART_BYTES = 32 * 2**20  # pixels of a part, which is what a process holds in memory


@dataclass
class Picture:
    """One image of a source: its file and what is known of it."""

    path: Path
    patient: str
    label: object
    split: int | None = None
    grade: int | None = None


class StoredImages:
    """Converted images on disk, (N, side, side, C) uint8. Indexing chooses rows; `blocks` reads them.

    Attributes:
        hashes: (N,) one number per image; equal pixels have equal numbers.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, files: list[Path], part: np.ndarray, place: np.ndarray, hashes: np.ndarray, picture) -> None:
        self.files, self.part, self.place, self.hashes, self.picture = files, part, place, hashes, tuple(picture)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.part), *self.picture)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, rows: np.ndarray) -> "StoredImages":
        return StoredImages(self.files, self.part[rows], self.place[rows], self.hashes[rows], self.picture)

    def blocks(self):
        """The images in order, (n, side, side, C) at a time; one part is in memory."""
        ends = np.flatnonzero(np.diff(self.part)) + 1
        for rows in np.split(np.arange(len(self)), ends):
            if len(rows):
                with np.load(self.files[self.part[rows[0]]]) as part:
                    yield part["pixels"][self.place[rows]]


class Converted(NamedTuple):
    """What `convert` returns.

    Attributes:
        images: the readable ones.
        kept: the pictures they are of, in the same order.
        report: how often each note was made, and the files that were skipped and why.
    """

    images: StoredImages
    kept: list[Picture]
    report: dict


def convert(pictures: list[Picture], prepare, side: int, target: Path, skip_bad: bool, workers: int) -> Converted:
    """Read, prepare and resize all pictures.

    Args:
        pictures: what to read.
        prepare: `image -> (image, note)` at source resolution; notes are counted in the report.
        side: of the result, pixels.
        target: the data set that it is for. Finished parts are kept in a hidden folder beside it, with a fingerprint of
            what is read in its name: the same call goes on with them, and parts of other calls are removed.
        skip_bad: leave unreadable files out instead of stopping.
        workers: number of processes.
    Raises:
        DatasetError: an unreadable file without `skip_bad`, or no readable file at all.
    """
    paths = [picture.path for picture in pictures]
    size = max(16, min(256, PART_BYTES // (3 * side * side)))
    about = f"{prepare.__module__}.{prepare.__name__} {side}"
    folder = target.with_name(f".{target.name}.work-{fingerprint(paths, about)}")
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    with held(folder, wait=False) as mine:
        if mine is False:
            raise DatasetError(f"another process is reading these images for {target}; wait until it has ended")
        clear(target, "work", not_parts)
        jobs = [(folder / f"{n:06d}.npz", paths[i : i + size]) for n, i in enumerate(range(0, len(paths), size))]
        _convert_parts(jobs, partial(_convert_part, prepare, side, skip_bad), skip_bad, workers)
        return _gather([file for file, _ in jobs], pictures, size, skip_bad)


def _convert_parts(jobs: list[tuple[Path, list[Path]]], convert_part, skip_bad: bool, workers: int) -> None:
    waiting = [job for job in jobs if not job[0].is_file()]
    total = sum(len(part) for _, part in jobs)
    known = total - sum(len(part) for _, part in waiting)
    if known:
        print(f"{known} of {total} images were converted before and are not read again")
    with (
        tqdm(total=total, unit="image", initial=known) as bar,
        ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool,
    ):
        for errors, count in pool.map(convert_part, waiting):
            bar.update(count)
            if errors and not skip_bad:
                pool.shutdown(cancel_futures=True)
                raise _unreadable(errors)


def not_parts(folder: Path) -> list[str]:
    """Names in a folder that are not parts of a conversion."""
    return [path.name for path in folder.iterdir() if not re.fullmatch(r"\.?\d{6}\.npz(\.\d+)?", path.name)]


def _unreadable(errors: list[str]) -> DatasetError:
    return DatasetError(f"{errors[0]}. Pass --skip-bad to leave such files out and list them")


def _end_with_parent() -> None:
    """A reading process whose script was killed would wait for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _convert_part(prepare, side: int, skip_bad: bool, job: tuple[Path, list[Path]]) -> tuple[list[str], int]:
    """Convert some files into one .npz; returns the errors and how many files there were.

    A part with errors is kept only if they are to be skipped; else it is read again when they may have been mended.
    """
    target, paths = job
    read = [_read_one(prepare, side, path) for path in paths]
    pixels = [image for image, _, _ in read if image is not None]
    about = {"notes": Counter(note for _, note, _ in read if note), "errors": [e for _, _, e in read if e]}
    arrays = {
        "pixels": np.stack(pixels) if pixels else np.zeros((0, side, side, 1), np.uint8),
        "hashes": pixel_hashes(pixels),
        "readable": np.array([image is not None for image, _, _ in read]),
        "about": np.array(json.dumps(about)),
    }

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    if skip_bad or not about["errors"]:
        atomic_write(target, save)
    return about["errors"], len(paths)


def _read_one(prepare, side: int, path: Path):
    """(H, W, C) pixels at `side`, a note on what was odd, and an error text if it could not be read."""
    try:
        with Image.open(path) as image:
            image.load()
            image, note = prepare(image)
    except Exception as error:
        return None, "", f"{path}: {error}"
    if image.size != (side, side):
        image = image.resize(
            (side, side), Image.Resampling.BOX if min(image.size) >= side else Image.Resampling.BICUBIC
        )
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(side, side, -1), note, ""


def _gather(files: list[Path], pictures: list[Picture], size: int, skip_bad: bool) -> Converted:
    """What the parts hold, without their pixels."""
    part, place, hashes, kept, notes, bad, picture = [], [], [], [], Counter(), [], ()
    for file in files:
        with np.load(file) as found:
            about, readable = json.loads(str(found["about"])), found["readable"]
            hashes.append(found["hashes"])
            if not kept and readable.any():
                picture = found["pixels"].shape[1:]
        first = int(file.stem) * size
        kept += [pictures[first + row] for row in np.flatnonzero(readable)]
        part.append(np.full(readable.sum(), len(part)))
        place.append(np.arange(readable.sum()))
        notes.update(about["notes"])
        bad += about["errors"]
    if bad and not skip_bad:
        raise _unreadable(bad)
    if not kept:
        raise DatasetError("no readable image was found in the source")
    images = StoredImages(files, *map(np.concatenate, (part, place, hashes)), picture)
    return Converted(images, kept, {"notes": dict(notes), "skipped": bad})


def pixel_hashes(images) -> np.ndarray:
    """(N,) one number per image; equal pixels give equal numbers."""
    if isinstance(images, StoredImages):
        return images.hashes
    digests = (hashlib.blake2b(x.tobytes(), digest_size=8).digest() for x in images)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def to_gray(image: Image.Image) -> Image.Image:
    """Eight-bit gray of any mode; 16-bit images are scaled, not cut off."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257 if values.max() > 255 else values).astype(np.uint8))
    return image.convert("L")


def gray(image: Image.Image) -> tuple[Image.Image, str]:
    """`to_gray` for `convert`, with a note where the image was not."""
    return to_gray(image), f"{image.mode} images turned gray" if image.mode != "L" else ""


def colour(image: Image.Image) -> tuple[Image.Image, str]:
    """`to_rgb` for `convert`, with a note where the image was not."""
    return to_rgb(image), f"{image.mode} images turned RGB" if image.mode != "RGB" else ""


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of any mode; transparent pixels become black."""
    if image.mode.startswith("I"):
        image = to_gray(image)
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")
