"""What the scripts share: the command line, reading images, splitting by patient, duplicates, the report."""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from mocolayers.datasets import SPLITS, data_folder, save_prepared
from mocolayers.errors import DatasetError

FRACTIONS = (0.6, 0.15, 0.25)  # train, val, test when the publisher gives no split


@dataclass
class Picture:
    """One image of a source: its file and what is known of it."""

    path: Path
    patient: str
    label: object
    split: int | None = None
    grade: int | None = None


def arguments(description: str, name: str, side: int, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="local copy of what the publisher gives; nothing is downloaded")
    parser.add_argument("--out", type=Path, default=data_folder(), help="folder of prepared data sets (%(default)s)")
    parser.add_argument("--name", default=name, help="name of the prepared data set (%(default)s)")
    parser.add_argument(
        "--side",
        type=int,
        default=side,
        help="side in pixels (%(default)s, as the lesson preset wants it)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split by patient (%(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read (%(default)s)")
    return parser


def run(main, parser: argparse.ArgumentParser) -> None:
    """Call `main(arguments)` and turn a `DatasetError` into one line and exit code 1."""
    try:
        main(parser.parse_args())
    except DatasetError as error:
        sys.exit(f"error: {error}")


def need_source(source: Path | None, what: str) -> Path:
    """The source folder or file, or an error that says what to pass."""
    if source is None:
        raise DatasetError(f"give --source PATH, the folder with {what}")
    if not source.exists():
        raise DatasetError(f"{source} does not exist; --source wants the folder with {what}")
    return source.resolve()


def inside(root: Path, name: str) -> Path:
    """`root / name`, refused if it would leave `root`."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DatasetError(f"{name!r} leads out of {root}; remove that line from the table")
    return path


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV with at least the given columns, as text."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}") from None
    table.columns = table.columns.str.strip()
    if missing := [name for name in columns if name not in table]:
        raise DatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table


def to_gray(image: Image.Image) -> Image.Image:
    """Eight-bit gray of any mode; 16-bit images are scaled, not cut off."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257 if values.max() > 255 else values).astype(np.uint8))
    return image.convert("L")


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of any mode; transparent pixels become black."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


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


def read_images(pictures: list[Picture], prepare, side: int, skip_bad: bool, workers: int):
    """Read, prepare and resize all pictures in parallel.

    Args:
        pictures: what to read.
        prepare: `image -> (image, note)` at source resolution; notes are counted in the report.
        side: of the result, pixels.
        skip_bad: leave unreadable files out instead of stopping.
        workers: number of processes.
    Returns:
        (N, side, side, C) uint8, the pictures that were kept, and a report of notes and skipped files.
    Raises:
        DatasetError: an unreadable file without `skip_bad`, or no readable file at all.
    """
    kept, images, notes, bad = [], [], {}, []
    paths = [picture.path for picture in pictures]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(_read_one, prepare, side), paths, chunksize=32)
        for picture, (pixels, note, error) in zip(pictures, tqdm(results, total=len(paths), unit="image"), strict=True):
            if error:
                bad.append(error)
                if not skip_bad:
                    pool.shutdown(cancel_futures=True)
                    raise DatasetError(f"{error}. Pass --skip-bad to leave such files out and list them")
                continue
            kept.append(picture)
            images.append(pixels)
            if note:
                notes[note] = notes.get(note, 0) + 1
    if not images:
        raise DatasetError("no readable image was found in the source")
    return np.stack(images), kept, {"notes": notes, "skipped": bad}


def split_by_patient(patients: np.ndarray, positive: np.ndarray, seed: int, fractions=FRACTIONS) -> np.ndarray:
    """Seeded split codes (N,) with whole patients, separately for patients with and without a positive image."""
    names, member = np.unique(patients, return_inverse=True)
    has = np.zeros(len(names), bool)
    np.logical_or.at(has, member, np.asarray(positive, bool))
    rng, code = np.random.default_rng(seed), np.zeros(len(names), np.uint8)
    for group in (np.flatnonzero(has), np.flatnonzero(~has)):
        shuffled = rng.permutation(group)
        first, second = (round(len(group) * share) for share in np.cumsum(fractions)[:2])
        code[shuffled[first:second]], code[shuffled[second:]] = 1, 2
    return code[member]


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """(N,) one number per image; equal pixels give equal numbers."""
    import hashlib

    return np.array([int.from_bytes(hashlib.blake2b(x.tobytes(), digest_size=8).digest(), "big") for x in images])


def rows_without_copies(images: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Rows to keep, so that no picture stands in two splits: the copy in the higher split code (test) stays."""
    names, member = np.unique(pixel_hashes(images), return_inverse=True)
    highest = np.zeros(len(names), split.dtype)
    np.maximum.at(highest, member, split)
    return np.flatnonzero(split == highest[member])


def duplicates(images: np.ndarray, split: np.ndarray) -> dict[str, int]:
    """How many images equal an earlier one, and how many pictures stand in more than one split."""
    names, member = np.unique(pixel_hashes(images), return_inverse=True)
    sides = np.zeros((len(names), len(SPLITS)), bool)
    sides[member, split] = True
    return {"duplicate_images": int(len(images) - len(names)), "across_splits": int((sides.sum(axis=1) > 1).sum())}


def finish(args: argparse.Namespace, arrays: dict[str, np.ndarray], card: dict, report: dict) -> None:
    """Complete the report, write the prepared data set, and print what it holds."""
    split, labels = arrays["split"], arrays["labels"]
    report = report | duplicates(arrays["images"], split) | {"patients": {}, "classes": {}}
    for name, code in SPLITS.items():
        inside_split = split == code
        if not inside_split.any():
            continue
        report["patients"][name] = int(len(np.unique(arrays["patients"][inside_split])))
        one_hot = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(card["classes"]))
        counted = one_hot[inside_split].sum(axis=0)
        report["classes"][name] = dict(zip(card["classes"], counted.tolist(), strict=True))
    place = save_prepared(args.out / args.name, arrays, card | {"report": report})
    print(f"{place}: {len(split)} images of {len(np.unique(arrays['patients']))} patients, {args.side} px")
    for name, counts in report["classes"].items():
        print(f"  {name}: {report['patients'][name]} patients, " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    print(f"  equal pixels: {report['duplicate_images']} images, {report['across_splits']} pictures in several splits")
    for note, count in report.get("notes", {}).items():
        print(f"  {note}: {count}")
    for line in report.get("skipped", []):
        print(f"  skipped {line}")
