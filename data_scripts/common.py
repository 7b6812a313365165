"""What the scripts share: the command line, splitting by patient, duplicates, the report and the contact sheet."""

import argparse
import errno
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from conversion import Converted, Picture, convert, discard
from copies import count_pairs, near_pairs, pixel_hashes, rows_without_copies, tie_copies
from sources import printable

from mocolayers.data.folders import check_name, check_target, tell_leftovers
from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import (
    ARRAYS,
    SPLITS,
    UNLABELLED,
    MedicalImages,
    Rows,
    data_folder,
    save_prepared,
)
from mocolayers.runtime import DatasetError, RunError, writing

FRACTIONS = (0.6, 0.15, 0.25)  # train, val, test when the publisher gives no split
VALIDATION = (0.85, 0.15, 0.0)  # when the publisher gives a test part
EIGHTH = (0.875, 0.125, 0.0)  # when no validation part is given
LEAST = {"side": 8, "seed": 0, "workers": 1}
EACH = 10  # pictures of each kind on the contact sheet
KINDS = 60  # lines of the contact sheet at most


def arguments(
    description: str, name: str | None, side: int, examples: str, files: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that every script has, and with `files` those of reading and splitting image files."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whence = "folder or archive as the publisher gives it; else it is downloaded"
    parser.add_argument("--source", type=Path, help=whence)
    parser.add_argument("--out", type=Path, default=data_folder(), help="folder of prepared data sets (%(default)s)")
    parser.add_argument("--name", default=name, help=f"name of the prepared data set{f' ({name})' * bool(name)}")
    pixels = "side in pixels (%(default)s, as the lesson preset wants it)"
    parser.add_argument("--side", type=int, default=side, help=pixels)
    if files:
        _add_reading(parser)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of scripts that read image files and split them."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the split by patient (%(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read (%(default)s)")
    deep = parser.add_mutually_exclusive_group()
    values = "values that become black and white in images of more than 8 bits; else the lowest and highest of all"
    deep.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=values)
    each = "for such images: percentiles 1 and 99 of each image instead, where exposures differ"
    deep.add_argument("--window", choices=["percentile"], help=each)


def add_available(parser: argparse.ArgumentParser) -> None:
    """The option of scripts that know which images the publisher has."""
    take = "take the part of the publisher's images that is there, and say how much is not"
    parser.add_argument("--available", action="store_true", help=take)


def run(main, parser: argparse.ArgumentParser) -> None:
    """Call `main(arguments)`; bad data, a full disk or Ctrl-C end in one line and exit code 1."""
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in no known encoding
    try:
        if "source" in args:
            check_places(args)
        with writing(args.out):
            out = args.out.resolve()
            tempfile.TemporaryFile(dir=next(place for place in (out, *out.parents) if place.exists())).close()
        main(args)
    except (DatasetError, RunError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        more = f"; make room on the disk of {args.out}, and the same command goes on" if full else ""
        sys.exit(printable(f"error: {error}{more}"))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")


def check_places(args: argparse.Namespace) -> None:
    """Refuse, before anything is read, a data set without a name and a place where the reader could lose something."""
    for option, least in LEAST.items():
        if option in args and getattr(args, option) < least:
            raise DatasetError(f"--{option} {getattr(args, option)}: give {least} or more")
    if args.name is None:
        args.name = getattr(args, "set", None)
    if args.name is None:
        raise DatasetError("give the data set a name: --name NAME")
    check_name(args.name)
    for option, given in vars(args).items():
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, Path) and option != "out":
                check_apart(path, args.out / args.name)
    target = args.out / args.name
    if target.exists():
        tell_leftovers(target, "*")  # what a kill at the end has left
    check_target(target)


def check_apart(source: Path, target: Path) -> None:
    """Refuse a source that holds the target or is held by it: one would be written over the other."""
    for inner, outer in ((source.resolve(), target), (target.resolve(), source)):
        if outer.exists() and any(part.exists() and part.samefile(outer) for part in (inner, *inner.parents)):
            raise DatasetError(f"{source} and the new data set {target}: one is inside the other; choose another --out")


def present(pictures: list[Picture], available: bool) -> tuple[list[Picture], dict[str, int]]:
    """The pictures whose files are there, and how many images and patients are not; an error unless `available`."""
    there = [picture for picture in pictures if picture.path.is_file()]
    missing = {picture.path: picture.patient for picture in pictures if not picture.path.is_file()}
    if missing and not (available and there):
        what = f"{next(iter(missing))} does not exist: {len(missing)} of {len(pictures)} images in the table"
        remedy = ", or pass --available to take the part that is" if there else ""
        raise DatasetError(f"{what} are not there. Complete the source{remedy}")
    lost, left = set(missing.values()), {picture.patient for picture in there}
    counts = {"there": len(there), "of": len(pictures), "patients_lost_some": len(lost & left)}
    return there, counts | {"patients_lost_all": len(lost - left)}


def read_images(pictures: list[Picture], prepare, channels: int, args: argparse.Namespace) -> Converted:
    """`convert` with the options of the command line; people who share a picture become one patient."""
    if args.range and not args.range[0] < args.range[1]:
        raise DatasetError(f"--range {args.range[0]:g} {args.range[1]:g}: the first value should be below the second")
    listed = {}
    if "available" in args:
        pictures, listed = present(pictures, args.available)
    intensity, target = args.range or args.window, args.out / args.name
    read = convert(pictures, prepare, channels, args.side, target, args.skip_bad, args.workers, intensity)
    read.report["listed"] = listed
    read.report["equal_with_other_label"] = tie_copies(read.images, read.kept)
    return read


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


def splits(kept: list[Picture], positive: np.ndarray, seed: int, fractions=FRACTIONS, given=None) -> np.ndarray:
    """The split codes (N,) that are given, by the pictures or by `given`; those that are None are drawn by patient."""
    given = [picture.split for picture in kept] if given is None else given
    split = np.array([-1 if code is None else code for code in given])
    rest = np.flatnonzero(split < 0)
    patients = np.array([picture.patient for picture in kept])
    split[rest] = split_by_patient(patients[rest], np.asarray(positive)[rest], seed, fractions)
    return split.astype(np.uint8)


def finish(args: argparse.Namespace, read: Converted, labels, given: np.ndarray, card: dict, **more) -> None:
    """Leave out copies across splits, write the prepared data set, and print what it holds.

    `labels`, the split codes `given` and the arrays in `more` have a row for each image that was read.
    """
    from mocolayers.notebook.figures import rendered

    check_splits(labels, given)
    hashes = pixel_hashes(read.images)
    keep = rows_without_copies(hashes, given)
    patients = np.array([picture.patient for picture in read.kept])
    arrays = {"labels": labels, "patients": patients, "split": given} | more
    arrays = {name: array[keep] for name, array in arrays.items()} | {"images": Rows(read.images, keep)}
    split, labels = arrays["split"], arrays["labels"]
    report = read.report | {"copies_left_out": len(given) - len(keep)}
    for name in (name for name, code in SPLITS.items() if code in set(given) - set(split)):
        lost = f"no {name} image is left: all were copies of pictures in another split"
        if SPLITS[name] != UNLABELLED:
            raise DatasetError(lost)
        print(f"warning: {lost}")
    near = near_pairs(arrays["images"])
    report |= {"duplicate_images": len(keep) - len(np.unique(hashes[keep]))}
    report |= {"near_copies": count_pairs(near, split), "patients": {}, "classes": {}}
    if "intensity" in report:
        card = card | {"intensity": report.pop("intensity")}
    one_hot = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(card["classes"]))
    for name in (name for name, code in SPLITS.items() if (split == code).any()):
        rows = split == SPLITS[name]
        report["patients"][name] = len(np.unique(arrays["patients"][rows]))
        if name == "unlabelled":
            continue
        report["classes"][name] = dict(zip(card["classes"], one_hot[rows].sum(axis=0).tolist(), strict=True))
        if lacking := [kind for kind, count in report["classes"][name].items() if not count]:
            print(f"warning: no {name} image shows {', '.join(map(repr, lacking))}")
    card = card | {"report": report}
    data = MedicalImages(args.name, card, **{name: arrays[name] for name in ARRAYS})
    sheet = contact_sheet(data, near[split[near[:, 0]] != split[near[:, 1]]])
    place = save_prepared(args.out / args.name, arrays, card, {"contact_sheet.png": rendered(sheet, quick=True)})
    if read.work:
        discard(read.work)
    print(f"{place}: {len(split)} images of {len(np.unique(arrays['patients']))} patients, {args.side} px")
    for name, patients in report["patients"].items():
        counts = report["classes"].get(name, {"images": int((split == UNLABELLED).sum())})
        print(f"  {name}: {patients} patients, " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    if listed := report.get("listed"):
        print("  publisher's images: " + ", ".join(f"{what.replace('_', ' ')} {n}" for what, n in listed.items()))
    copies = f"{report['copies_left_out']} copies of pictures in another split are left out"
    print(f"  equal pixels: {report['duplicate_images']} images; {copies}")
    pairs = ", ".join(f"{count} {where}" for where, count in report["near_copies"].items())
    print(f"  near-equal pairs: {pairs or 'none found'}")
    for note, count in report.get("notes", {}).items():
        print(f"  {note}: {count}")
    for line in report.get("skipped", []):
        print(f"  skipped {line}")


def check_splits(labels: np.ndarray, split: np.ndarray) -> None:
    """Refuse a set of which nothing can be learnt or measured."""
    for name, code in SPLITS.items():
        if code != UNLABELLED and not (split == code).any():
            raise DatasetError(f"no image is in the {name} split; give more patients, or a split for every image")
    if len(np.unique(labels[split != UNLABELLED], axis=0)) == 1:
        raise DatasetError("every image has the same label: there is nothing to learn")


def contact_sheet(data: MedicalImages, near: np.ndarray):
    """A figure of some random images of every class in every split, and of near-equal pairs (P, 2) in two splits."""
    from matplotlib import rc_context

    from mocolayers.notebook.figures import image_sheet

    rng, groups = np.random.default_rng(0), {}
    if len(near):
        groups["near-equal pairs\nin two splits"] = data.images[near[: EACH // 2].ravel()]
    for split in SPLITS:
        rows = data.rows(split)
        kinds = dict(zip(data.classes, class_matrix(data, rows).T, strict=True))
        if split == "unlabelled":
            kinds = {"": np.ones(len(rows), bool)}
        for name, inside in kinds.items():
            if inside.any() and len(groups) < KINDS:
                chosen = np.sort(rng.permutation(rows[inside])[:EACH])
                groups[f"{split}: {name}"] = data.images[chosen]
    with rc_context({"text.parse_math": False}):  # a $ in the name of a class is a $
        return image_sheet(groups, f"{data.name}: {len(data.images)} images of {data.side} px")
