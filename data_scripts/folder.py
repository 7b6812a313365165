"""Your own images, a CSV or one folder per class, to the prepared format."""

import os
import re
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from common import EIGHTH, FRACTIONS, arguments, finish, read_images, run, splits
from conversion import Picture, colour, gray
from PIL import Image, ImageOps
from pixels import ORIENTATION, convert_with, is_dicom
from sources import inside, open_source, pictures_in, printable, read_table, visible

from mocolayers.data.prepared import SPLITS, TASKS, TEST, TRAIN, UNLABELLED, VAL
from mocolayers.runtime import DatasetError

SPLIT_NAMES = SPLITS | {"training": TRAIN, "valid": VAL, "validation": VAL, "testing": TEST, "unlabeled": UNLABELLED}
NO_LABEL = ["", "nan", "na", "n/a"]
SHOWN = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # in a column for one label of several
SQUARE = {"pad": "padded to a square", "crop": "cropped to a square", "stretch": "stretched to a square"}
UNEVEN = 0.2  # between the shares of oblong images of two classes
MODALITIES = ("chest", "histology", "retina", "other")
EXAMPLES = """  python data_scripts/folder.py --source ~/scans --name scans --modality chest --gray
      where ~/scans/CLASS/*.png, or ~/scans/train|val|test/CLASS/*.png
  python data_scripts/folder.py --source ~/scans --name scans --patient-regex '(P\\d+)_'
  python data_scripts/folder.py --source ~/scans --name scans --csv ~/scans/table.csv \\
      --file path --label opacity effusion --patient patient --split fold
      several label columns of 0 and 1: multilabel; one: its values are the classes"""


def from_classes(source: Path, pattern: str | None) -> tuple[list[Picture], list[str]]:
    """One folder per class, perhaps inside folders named as splits; labels are places in the class list."""
    if linked := [path for path in visible(source) if path.is_symlink() and path.is_dir()]:
        raise DatasetError(f"{linked[0]} is a link to a folder, which is not followed; put the folder itself there")
    folders = _folders(source)
    while len(folders) == 1 and folders[0].name.lower() not in SPLIT_NAMES and _folders(folders[0]):
        source = folders[0]  # an archive often has one folder on top
        folders = _folders(source)
    places = {folder: SPLIT_NAMES.get(folder.name.lower()) for folder in folders}
    if set(places.values()) <= {None}:
        places = {source: None}
    elif unknown := [folder for folder, code in places.items() if code is None]:
        raise DatasetError(f"{unknown[0]} is beside folders of splits; name it one of {', '.join(SPLIT_NAMES)}")
    judged = [place for place, code in places.items() if code != UNLABELLED]
    classes = sorted({folder.name for place in judged for folder in visible(place) if folder.is_dir()})
    pictures = []
    for place, code in places.items():
        for path in pictures_in(place):
            parent = path.relative_to(place).parts[0]
            if place in judged and parent not in classes:
                raise DatasetError(f"{path} is in no class folder; expected {place}/CLASS/{path.name}")
            label = classes.index(parent) if parent in classes else 0
            pictures.append(Picture(path, _patient(path, pattern), label, code))
    if not pictures:
        others = [f"{path} is {advice}" for path in visible(source, "**/*") if (advice := convert_with(path))]
        what = "CLASS/*.png (or .jpg, .tif, .dcm, ...); give --csv FILE for a table"
        raise DatasetError(others[0] if others else f"{source} holds no {what}")
    return pictures, [printable(name) for name in classes]


def _folders(folder: Path) -> list[Path]:
    """Its folders in which there are images."""
    return [path for path in visible(folder) if path.is_dir() and pictures_in(path)]


def _patient(path: Path, pattern: str | None) -> str | None:
    if pattern is None:
        return _dicom_ids(path)[0]
    try:
        found = re.search(pattern, path.name)
    except re.error as error:
        raise DatasetError(f"--patient-regex {pattern!r}: {error}; write it like '(P[0-9]+)_'") from None
    if not found or not found.groups() or not found[1]:
        raise DatasetError(f"--patient-regex {pattern!r} finds no group in {path.name!r}; write it like '(P[0-9]+)_'")
    return found[1]


@cache
def _dicom_ids(path: Path) -> tuple[str | None, str | None]:
    """The PatientID and the StudyInstanceUID of a DICOM file."""
    if not is_dicom(path):
        return None, None
    from pydicom import dcmread

    names = ["PatientID", "StudyInstanceUID"]
    with suppress(Exception):  # a damaged file is told when its image is read
        file = dcmread(path, stop_before_pixels=True, force=True, specific_tags=names)
        return tuple(str(file.get(name) or "").strip() or None for name in names)
    return None, None


def check_studies(paths: list[Path]) -> None:
    """Warn of PatientIDs that are hardly people, such as numbers of slices: a study is of one person."""
    known = {}
    for patient, study in map(_dicom_ids, paths):
        if patient and study and (other := known.setdefault(study, patient)) != patient:
            remedy = "if they are one person, tell patients by --patient-regex, or by --csv and --patient"
            print(f"warning: the DICOM study {study} has the patients {other!r} and {patient!r}; {remedy}")
            return


def left_out(source: Path, pictures: list[Picture], table: Path | None) -> dict[str, int]:
    """How many files of the source are no part of the data set, by ending, and folders that were not looked into."""
    used = {picture.path.resolve() for picture in pictures} | {table and table.resolve()}
    others = [path for path in visible(source, "**/*") if path.resolve() not in used]
    for advice in dict.fromkeys(filter(None, map(convert_with, others))):
        print(f"warning: beside the images there is {advice}")
    return dict(Counter(filter(None, map(_kind, others))).most_common())


def _kind(path: Path) -> str | None:
    """The ending of a file, or why a folder was not looked into; None for one that was."""
    if not path.is_dir():
        return printable(path.suffix.lower()) or "no ending"
    if path.is_symlink():
        return "links to folders"
    return None if os.access(path, os.R_OK | os.X_OK) else "folders without permission to read"


def from_table(source: Path, args) -> tuple[list[Picture], list[str]]:
    """One line per image; labels are places in the class list, or 0 and 1 for each of several label columns."""
    wanted = [args.file, *args.label, *filter(None, (args.patient, args.split))]
    table = read_table(args.csv, wanted)
    labels, classes = _labels(table, args)
    pictures, known = [], {}
    for row, name in enumerate(table[args.file]):
        path = inside(source, name, args.csv)
        if not path.is_file():
            raise DatasetError(f"{args.csv}: {name!r} is not under {source}")
        split = _split(table[args.split][row], args.csv) if args.split else None
        patient = table[args.patient][row] if args.patient else _patient(path, args.patient_regex)
        if patient == "":
            raise DatasetError(f"{args.csv}: {name!r} has no patient; give it one of its own if it is the only image")
        pictures.append(Picture(path, patient, labels[row], split))
        first = known.setdefault(path, pictures[-1])
        if first != pictures[-1]:
            raise DatasetError(f"{args.csv}: {name!r} is listed twice, and not with the same label, patient and split")
    return pictures, classes


def check_spelling(names, what: str) -> None:
    """Refuse names that differ only by blanks, case, leading zeros or ".0", or that a spreadsheet has rounded."""
    known = {}
    for name in names:
        if re.fullmatch(r"\d(\.\d+)?[eE]\+\d+", name):
            raise DatasetError(f"{what}: {name!r} is a long number that a spreadsheet has rounded; export it as text")
        key = re.sub(r"(?<![\d.])0+(?=\d)|\s|\.0+$", "", name).casefold()
        if (other := known.setdefault(key, name)) != name:
            raise DatasetError(f"{what} {other!r} and {name!r}: write them alike, or tell them apart by more than that")


def _labels(table: pd.DataFrame, args) -> tuple[list, list[str]]:
    unlabelled = (
        table[args.split].str.lower().isin(["unlabelled", "unlabeled"]) if args.split else np.zeros(len(table), bool)
    )
    told = table.loc[~unlabelled, args.label]
    if (empty := told.apply(lambda column: column.str.lower().isin(NO_LABEL)).any(axis=1)).any():
        first = table[args.file][told.index[empty][0]]
        remedy = "remove these lines, or name a --split column that says 'unlabelled' there"
        raise DatasetError(f"{args.csv}: no label for {empty.sum()} images, for example {first!r}; {remedy}")
    if (unsure := told.isin(["-1", "-1.0"])).any(axis=None) and told.isin(["0", "0.0"]).any(axis=None):
        question = "is it uncertain, or no label? Write a word for it, or remove these lines"
        raise DatasetError(f"{args.csv}: -1 in {unsure.sum().sum()} cells beside 0: {question}")
    if len(args.label) > 1:
        shown = table[args.label].apply(lambda column: column.str.lower().map(SHOWN))
        if shown[~unlabelled].isna().any(axis=None):
            raise DatasetError(f"{args.csv}: the label columns {', '.join(args.label)} should hold 0 and 1 only")
        return shown.fillna(0).astype(int).to_numpy().tolist(), list(args.label)
    column = table[args.label[0]]
    numbers = pd.to_numeric(told[args.label[0]], errors="coerce")
    classes = told[args.label[0]].unique()
    classes = sorted(classes, key=float) if numbers.notna().all() else sorted(classes)
    if args.task == "ordinal" and not numbers.notna().all():
        raise DatasetError(f"{args.csv}: --task ordinal wants numbers in {args.label[0]!r}, found {classes[0]!r}")
    return [classes.index(value) if value in classes else 0 for value in column], classes


def _split(name: str, csv: Path) -> int:
    if name.lower() not in SPLIT_NAMES:
        raise DatasetError(f"{csv}: {name!r} is no split; write {', '.join(SPLITS)}")
    return SPLIT_NAMES[name.lower()]


def task_of(args, classes: list[str]) -> str:
    """What kind of labels these are, from the columns and the number of classes unless told."""
    if args.csv and len(args.label) > 1:
        return "multilabel"
    if len(classes) < 2:
        raise DatasetError(f"every image has the same class, {classes[0]!r}: there is nothing to learn")
    if args.task == "binary" and len(classes) > 2:
        raise DatasetError(f"--task binary wants two classes, found {len(classes)}: {', '.join(classes)}")
    return args.task or ("binary" if len(classes) == 2 else "multiclass")


def upright_square(shape: str, channels: int, image: Image.Image) -> tuple:
    """Turn an image as its EXIF data ask, and make it square."""
    turned = "turned upright, as EXIF asks" if image.getexif().get(ORIENTATION, 1) != 1 else ""
    image, note = (gray if channels == 1 else colour)(ImageOps.exif_transpose(image))
    if image.width == image.height:
        return image, note, turned
    if shape != "stretch":
        size, fit = (max(image.size), ImageOps.pad) if shape == "pad" else (min(image.size), ImageOps.fit)
        image = fit(image, (size, size))
    return image, note, turned, SQUARE[shape]


def oblong(kept: list[Picture], labels: np.ndarray, split: np.ndarray, classes: list[str]) -> dict[str, list[int]]:
    """For each class how many of its images were not square, and how many it has."""
    odd = np.array([bool(set(SQUARE.values()) & set(picture.notes)) for picture in kept])
    one_hot = (labels if labels.ndim == 2 else np.eye(len(classes), dtype=int)[labels]) * (split != UNLABELLED)[:, None]
    counts = {name: [int(odd @ shown), int(shown.sum())] for name, shown in zip(classes, one_hot.T, strict=True)}
    if odd.any():
        print("not square: " + ", ".join(f"{name} {some} of {every}" for name, (some, every) in counts.items()))
    shares = [some / every for some, every in counts.values() if every]
    if max(shares) - min(shares) > UNEVEN:
        print("warning: the shape of an image gives its class away; try --crop, and see what is lost")
    return counts


def main(args) -> None:
    if args.csv and not args.label:
        raise DatasetError("--csv wants --label COLUMN as well, one or several")
    if args.source is None:
        raise DatasetError("give --source PATH, the folder with your images")
    source = open_source(args.source, "your images", args.out, "")
    pictures, classes = from_table(source, args) if args.csv else from_classes(source, args.patient_regex)
    task = task_of(args, classes)
    if task != "multilabel" and 2 * len(classes) > len(pictures):
        print(f"warning: {len(classes)} classes of {len(pictures)} images: are these labels?")
    if not (args.patient or args.patient_regex):
        check_studies([picture.path for picture in pictures])
    check_spelling(classes, "classes")
    check_spelling(sorted({picture.patient for picture in pictures if picture.patient}), "patients")
    if unknown := [picture for picture in pictures if not picture.patient]:
        which = f"of {len(unknown)} images " * (len(unknown) < len(pictures))
        print(f"no patients {which}are known: every image counts as a patient of its own, so check that no one has two")
        for picture in unknown:
            picture.patient = printable(picture.path.relative_to(source))
    given = {picture.split for picture in pictures} - {None}
    if given and VAL not in given:
        print("no validation split is given: an eighth of the training patients is taken for it")
        fixed = {picture.patient for picture in pictures if picture.split != TRAIN}
        for picture in (picture for picture in pictures if picture.patient not in fixed):
            picture.split = None
    channels = 1 if args.gray else 3
    prepare = partial(upright_square, args.shape or "pad", channels)
    read = read_images(pictures, prepare, channels, args)
    kept, report = read.kept, read.report
    report["left_out"] = left_out(source, pictures, args.csv)
    if report["left_out"]:
        print("files left out: " + ", ".join(f"{count} {kind}" for kind, count in report["left_out"].items()))
    labels = np.array([picture.label for picture in kept], np.uint8 if task == "multilabel" else np.int64)
    positive = labels.any(axis=1) if labels.ndim == 2 else labels > 0
    split = splits(kept, positive, args.seed, EIGHTH if given else FRACTIONS)
    if task != "multilabel" and (empty := set(range(len(classes))) - set(labels[split != UNLABELLED].tolist())):
        raise DatasetError(f"no readable image shows {classes[min(empty)]!r}; mend or remove it")
    card = {"title": args.title or args.name, "modality": args.modality, "task": task, "classes": classes}
    card |= {"source": str(args.source.name), "licence": "your own", "citation": ""}
    report["not_square"] = oblong(kept, labels, split, classes)
    finish(args, read, labels, split, card)


if __name__ == "__main__":
    parser = arguments(__doc__, None, 28, EXAMPLES)
    parser.add_argument("--csv", type=Path, help="table with one line per image; else one folder per class")
    parser.add_argument("--file", default="file", help="its column of paths below --source (%(default)s)")
    parser.add_argument("--label", nargs="+", default=[], help="its column or columns of labels")
    parser.add_argument("--patient", help="its column of patients; else --patient-regex, else DICOM's own")
    parser.add_argument("--split", help="its column of splits: train, val, test, unlabelled")
    parser.add_argument("--patient-regex", help="finds the patient in a file name, as the first group")
    parser.add_argument("--task", choices=[t for t in TASKS if t != "multilabel"], help="kind of labels; else guessed")
    parser.add_argument("--modality", choices=MODALITIES, default="other", help="decides the views (%(default)s)")
    parser.add_argument("--gray", action="store_true", help="one channel, for X-rays; else colour")
    shape = parser.add_mutually_exclusive_group()
    for way, what in (
        ("crop", "cut the middle out of images that are not square; else a black border is added"),
        ("stretch", "stretch them"),
    ):
        shape.add_argument(f"--{way}", dest="shape", action="store_const", const=way, help=what)
    parser.add_argument("--title", help="for figures; else the name")
    run(main, parser)
