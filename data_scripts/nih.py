"""NIH ChestX-ray14: the publisher's tree (Data_Entry_2017.csv, images_*/images/*.png) to the prepared format.

EXIF orientation is not applied and images are stretched to a square, as users of this set expect.
"""

from pathlib import Path

import numpy as np
from common import EIGHTH, add_available, arguments, finish, read_images, run, splits
from conversion import Picture, gray
from sources import inside, open_source, read_table, visible

from mocolayers.data.prepared import TEST, UNLABELLED
from mocolayers.runtime import DatasetError

FINDINGS = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
]  # fmt: skip
KAGGLE = "nih-chest-xrays/data"
LISTS = ("train_list.txt", "val_list.txt", "test_list.txt")
OFFICIAL_LISTS = ("train_val_list.txt", "test_list.txt")
CARD = {
    "title": "NIH ChestX-ray14",
    "modality": "chest",
    "source": "Kaggle nih-chest-xrays/data, from the NIH Clinical Center",
    "licence": "free to use with credit to the NIH Clinical Center",
    "citation": "Wang et al., ChestX-ray8, CVPR 2017",
}
EXAMPLES = """  python data_scripts/nih.py --source ~/nih
  python data_scripts/nih.py --source ~/nih --task finding --side 128 --name nih_finding
  python data_scripts/nih.py --source ~/nih_small --unlabelled ~/nih_more      (the second for pretraining only)"""


def find(source: Path) -> list[Picture]:
    """Every image of the table that names its findings and its patient."""
    table, columns = source / "Data_Entry_2017.csv", ["Image Index", "Finding Labels", "Patient ID"]
    rows = read_table(table, columns)
    files = {path.name: path for path in visible(source, "images*/**/*.png")}
    pictures = []
    for name, findings, patient in zip(*(rows[column] for column in columns), strict=True):
        path = files.get(name) or inside(source / "images", name)
        shown = set(findings.split("|"))
        if unknown := shown - set(FINDINGS) - {"No Finding"}:
            raise DatasetError(f"{table}: {name} has an unknown finding {sorted(unknown)[0]!r}")
        if not patient.isdecimal():
            raise DatasetError(f"{table}: {name} has the patient {patient!r}, which is no number")
        pictures.append(Picture(path, str(int(patient)), [int(f in shown) for f in FINDINGS]))
    return pictures


def given_splits(source: Path, told: Path | None, pictures: list[Picture], seed: int) -> np.ndarray:
    """Split codes from the lists in the folder that is told, else in the source; else seeded ones by patient.

    The publisher's own two lists know no validation: a seeded eighth of the patients of the first is taken for it, as
    the sizes of the paper's lists have it.
    """
    folder, positive = told or source, [any(picture.label) for picture in pictures]
    if all((folder / name).is_file() for name in LISTS):
        return _from_lists(folder, LISTS, pictures)
    if all((folder / name).is_file() for name in OFFICIAL_LISTS):
        given = [TEST if code else None for code in _from_lists(folder, OFFICIAL_LISTS, pictures)]
        return splits(pictures, positive, seed, EIGHTH, given)
    if told:
        raise DatasetError(f"{folder} holds neither {' and '.join(OFFICIAL_LISTS)} nor {', '.join(LISTS)}")
    return splits(pictures, positive, seed)


def _from_lists(folder: Path, lists: tuple[str, ...], pictures: list[Picture]) -> np.ndarray:
    """For every picture the number of the list that names it."""
    code = {}
    for number, name in enumerate(lists):
        for line in (folder / name).read_text(encoding="utf-8-sig", errors="replace").split("\n"):
            if line.strip():
                code[line.split()[0]] = number
    missing = [picture.path.name for picture in pictures if picture.path.name not in code]
    if missing:
        raise DatasetError(f"{folder}: {missing[0]} stands in none of {', '.join(lists)}")
    return np.array([code[picture.path.name] for picture in pictures], np.uint8)


def unlabelled(source: Path, known: list[Picture], split: np.ndarray) -> list[Picture]:
    """Images of a second tree for pretraining: none that the first tree holds, no patient that is judged."""
    files = {picture.path.name for picture in known}
    judged = {picture.patient for picture, code in zip(known, split, strict=True) if code in (1, 2)}
    more = [p for p in find(source) if p.path.name not in files and p.patient not in judged]
    for picture in more:
        picture.split = UNLABELLED
    return more


def main(args) -> None:
    source = open_source(args.source, "Data_Entry_2017.csv and images_*/", args.out, KAGGLE)
    pictures = find(source)
    split = given_splits(source, args.splits, pictures, args.seed)
    for picture, code in zip(pictures, split, strict=True):
        picture.split = int(code)
    if args.unlabelled:
        pictures += unlabelled(open_source(args.unlabelled, "a second NIH tree", args.out, KAGGLE), pictures, split)
    read = read_images(pictures, gray, 1, args)
    labels = np.array([picture.label for picture in read.kept], np.uint8)
    task = {"task": "multilabel", "classes": FINDINGS}
    if args.task == "finding":
        labels, task = labels.any(axis=1).astype(np.uint8), {"task": "binary", "classes": ["no finding", "finding"]}
    split = np.array([picture.split for picture in read.kept], np.uint8)
    finish(args, read, labels, split, CARD | task)


if __name__ == "__main__":
    parser = arguments(__doc__, "nih", 28, EXAMPLES)
    parser.add_argument("--task", choices=("labels", "finding"), default="labels", help="14 labels, or finding or none")
    lists = f"folder with {', '.join(LISTS)}, or else {' and '.join(OFFICIAL_LISTS)}; else the source, else by seed"
    parser.add_argument("--splits", type=Path, help=lists)
    parser.add_argument("--unlabelled", type=Path, help="a second NIH tree, used for pretraining only")
    add_available(parser)
    run(main, parser)
