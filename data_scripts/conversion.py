"""Many image files to pixels of one size: in parallel, into one array on disk, so that a killed script goes on."""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from pixels import eight_bits, extremes
from sources import fingerprint, printable
from tqdm import tqdm

from mocolayers.data.folders import tell_leftovers
from mocolayers.data.prepared import Rows
from mocolayers.runtime import DatasetError, atomic_write, held

CHUNK = 64  # images of one job, which are read again after a kill
PIXELS, JOURNAL, INTENSITY = "images.npy", "done.jsonl", "intensity.json"


@dataclass
class Picture:
    """One image of a source: its file and what is known of it."""

    path: Path
    patient: str
    label: object
    split: int | None = None
    notes: list[str] = field(default_factory=list)


class Converted(NamedTuple):
    """What `convert` returns.

    Attributes:
        images: (n, side, side, C) uint8, the readable ones, on disk.
        kept: the pictures they are of, in the same order.
        report: how often each note was made, what was skipped and why, and the "intensity" of deep images.
        work: the folder of what is kept until the data set is done, see `discard`.
    """

    images: Rows
    kept: list[Picture]
    report: dict
    work: Path | None = None


def convert(
    pictures: list[Picture],
    prepare,
    channels: int,
    side: int,
    target: Path,
    skip_bad: bool,
    workers: int,
    intensity=None,
) -> Converted:
    """Read, prepare and resize all pictures.

    Args:
        pictures: what to read.
        prepare: `image -> (image, note, ...)` at source resolution; notes are counted in the report.
        channels: of the prepared images, 1 or 3.
        side: of the result, pixels.
        target: the data set that it is for. Pixels and a journal of what is done are kept in a hidden folder beside it,
            named with a fingerprint of what is read, so that the same call goes on; see `discard`.
        skip_bad: leave unreadable files out instead of stopping.
        workers: number of processes.
        intensity: of images deeper than eight bits: the values that become black and white, or "percentile" for those
            of each image; None for the lowest and highest of all files.
    Raises:
        DatasetError: an unreadable file without `skip_bad`, or no readable file at all.
    """
    paths = [picture.path for picture in pictures]
    whole = prepare.args if isinstance(prepare, partial) else ()
    named = getattr(prepare, "func", prepare)
    about = f"{named.__module__}.{named.__name__} {whole} {channels} {side} {intensity}"
    work = target.with_name(f".{target.name}.work-{fingerprint(paths, about)}")
    work.mkdir(parents=True, exist_ok=True)
    with held(work, wait=False) as mine:
        if mine is False:
            raise DatasetError(f"another process is reading these images for {target}; wait until it has ended")
        tell_leftovers(target, "work", own=work)
        if not (work / JOURNAL).is_file():
            shape = (len(paths), side, side, channels)
            np.lib.format.open_memmap(work / PIXELS, "w+", np.uint8, shape)
            (work / JOURNAL).touch()
        chunks = _fill(work, paths, prepare, skip_bad, workers, intensity)
    images = np.load(work / PIXELS, mmap_mode="r")
    bad = {int(row): error for chunk in chunks for row, error in chunk["errors"].items()}
    good = np.setdiff1d(np.arange(len(paths)), list(bad))
    if not len(good):
        raise DatasetError("no readable image was found in the source")
    notes = Counter()
    for row, said in ((int(row), said) for chunk in chunks for row, said in chunk["notes"].items()):
        pictures[row].notes = said
        notes.update(said)
    report = {"notes": dict(notes), "skipped": list(bad.values())}
    if any("scaled to 8 bits" in note for note in notes):
        report["intensity"] = json.loads((work / INTENSITY).read_text()) or "the window of each file"
    return Converted(Rows(images, good), [pictures[row] for row in good], report, work)


def discard(work: Path) -> None:
    """Remove the files that `convert` has kept for a data set, which is done now, and their folder if it is empty."""
    with suppress(OSError):  # a file of someone else is in it, or Windows still reads one of ours
        for name in (PIXELS, JOURNAL, INTENSITY):
            (work / name).unlink(missing_ok=True)
        work.rmdir()


def _fill(work: Path, paths: list[Path], prepare, skip_bad: bool, workers: int, intensity) -> list[dict]:
    """Read all chunks that the journal lacks; returns its entries in the order of the files.

    A chunk with errors counts as done only if they are to be skipped: else its files may have been mended.
    """
    done = {}
    for line in (work / JOURNAL).read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a kill may have cut a line short
            chunk = json.loads(line)
            if skip_bad or not chunk["errors"]:
                done[chunk["first"]] = chunk
    waiting = [first for first in range(0, len(paths), CHUNK) if first not in done]
    before = len(paths) - sum(len(paths[first : first + CHUNK]) for first in waiting)
    if before:
        print(f"{before} of {len(paths)} images were converted before and are not read again")
    with (
        open(work / JOURNAL, "ab", buffering=0) as journal,
        tqdm(total=len(paths), unit="image", initial=before) as bar,
        ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool,
    ):
        try:
            if not (work / INTENSITY).is_file():
                found = intensity or _whole_range(pool.map(extremes, paths, chunksize=CHUNK))
                atomic_write(work / INTENSITY, lambda file: file.write_text(json.dumps(found)))
            known = json.loads((work / INTENSITY).read_text())
            read = partial(_read_chunk, work / PIXELS, prepare, known, intensity is None)
            for chunk in pool.map(read, waiting, [paths[first : first + CHUNK] for first in waiting]):
                if chunk["errors"] and not skip_bad:
                    advice = "Pass --skip-bad to leave such files out and list them"
                    raise DatasetError(f"{next(iter(chunk['errors'].values()))}. {advice}")
                done[chunk["first"]] = chunk
                journal.write(b"\n" + json.dumps(chunk).encode())
                bar.update(len(paths[chunk["first"] : chunk["first"] + CHUNK]))
        finally:
            pool.shutdown(cancel_futures=True)
    return [done[first] for first in sorted(done)]


def _whole_range(found) -> list[float] | None:
    """The lowest and highest value of all deep images, so that one window serves the whole set."""
    limits = [pair for pair in found if pair]
    return [min(low for low, _ in limits), max(high for _, high in limits)] if limits else None


def _end_with_parent() -> None:
    """Without this a reading process whose script was killed waits for ever, and one that Ctrl-C reaches complains."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


def _read_chunk(pixels: Path, prepare, intensity, windowed: bool, first: int, paths: list[Path]) -> dict:
    """Write the pixels of some files to their rows, from `first` on; returns the entry for the journal."""
    chunk, array = {"first": first, "notes": {}, "errors": {}}, np.load(pixels, mmap_mode="r")
    # Not written through the map: on a full disk that ends in a signal instead of an error.
    with open(pixels, "r+b") as file:
        for row, path in enumerate(paths, first):
            try:
                image, notes = _read_one(path, prepare, array.shape[1:], intensity, windowed)
            except Exception as error:
                said = "it is damaged, or no image" if isinstance(error, UnidentifiedImageError) else error
                chunk["errors"][row] = printable(f"{path}: {said}")
                continue
            file.seek(array.offset + row * image.nbytes)
            file.write(image.tobytes())
            if notes:
                chunk["notes"][row] = notes
    return chunk


def _read_one(path: Path, prepare, shape: tuple[int, ...], intensity, windowed) -> tuple[np.ndarray, list[str]]:
    """(side, side, C) pixels and notes on what was odd."""
    side = shape[0]
    image, notes = eight_bits(path, intensity, windowed)
    image, *more = prepare(image)
    if image.size != (side, side):
        smaller = min(image.size) >= side
        image = image.resize((side, side), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(shape), notes + [note for note in more if note]


def gray(image: Image.Image) -> tuple[Image.Image, str]:
    """Eight-bit gray of any eight-bit mode, and a note where it was not gray; transparent pixels become black."""
    opaque = to_rgb(image) if image.has_transparency_data else image
    return opaque.convert("L"), f"{image.mode} images turned gray" if image.mode != "L" else ""


def colour(image: Image.Image) -> tuple[Image.Image, str]:
    """`to_rgb` for `convert`, with a note where the image was not."""
    return to_rgb(image), f"{image.mode} images turned RGB" if image.mode != "RGB" else ""


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of any eight-bit mode; transparent pixels become black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")
