"""Photographs of the retina, EyePACS, IDRiD, APTOS 2019 or ODIR-5K in the publisher's layout, to the prepared format.

EXIF orientation is not applied; images are cropped to the retina's disc on a black square.
"""

import re
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import FRACTIONS, VALIDATION, add_available, arguments, finish, read_images, run, splits
from conversion import Converted, Picture, to_rgb
from copies import near_pairs, tie
from PIL import Image
from scipy import ndimage
from sources import inside, open_source, read_table, visible

from mocolayers.data.prepared import TEST, UNLABELLED, VAL, Rows
from mocolayers.runtime import DatasetError

REFERABLE, SEVERE = 2, 3  # the lowest grade of each
GRADES = [f"grade {grade}" for grade in range(5)]
ODIR_CLASSES = {
    "N": "normal",
    "D": "diabetes",
    "G": "glaucoma",
    "C": "cataract",
    "A": "age-related macular degeneration",
    "H": "hypertension",
    "M": "myopia",
    "O": "other",
}
TASKS = {
    "referable": {"task": "binary", "classes": ["not referable", "referable"]},
    "grade": {"task": "ordinal", "classes": GRADES},
    "severe": {"task": "binary", "classes": ["grade 1 or 2", "grade 3 or 4"]},
    "classes": {"task": "multiclass", "classes": list(ODIR_CLASSES.values())},
}
KAGGLE = "competition:diabetic-retinopathy-detection"
EXAMPLES = """  python data_scripts/retina.py --source ~/eyepacs
  python data_scripts/retina.py --source ~/idrid --name idrid --task grade
  python data_scripts/retina.py --source ~/odir --name odir
  python data_scripts/retina.py --source ~/aptos --name aptos --task severe --unlabelled ~/odir ~/eyepacs ~/idrid"""


def graded(table: Path, columns: tuple[str, str], folder: Path, ending: str) -> list[Picture]:
    """One picture for each row of a table of names and grades 0 to 4; its patient is its name."""
    rows, pictures = read_table(table, list(columns)), []
    for name, grade in zip(rows[columns[0]], rows[columns[1]], strict=True):
        if not re.fullmatch(r"[0-4](\.0+)?", grade):
            raise DatasetError(f"{table}: {name} has the grade {grade!r}; grades are 0 to 4")
        pictures.append(Picture(inside(folder, name + ending, table), name, int(float(grade))))
    return pictures


def find_eyepacs(source: Path) -> list[Picture]:
    """Both eyes carry the patient's number: ID_left.jpeg, ID_right.jpeg.

    The labels of the competition's test images were published later; they are used where their file is.
    """
    pictures = graded(source / "trainLabels.csv", ("image", "level"), source / "train", ".jpeg")
    if (source / "retinopathy_solution.csv").is_file():
        pictures += graded(source / "retinopathy_solution.csv", ("image", "level"), source / "test", ".jpeg")
    for picture in pictures:
        picture.patient = picture.patient.rsplit("_", 1)[0]
    return pictures


def find_idrid(source: Path) -> list[Picture]:
    """IDRiD names no patients and numbers its two parts alike: every image is a patient of its own, part included."""
    pictures = []
    for part, split in (("train", None), ("test", TEST)):
        table = source / f"{part}_labels.csv"
        for picture in graded(table, ("Image name", "Retinopathy grade"), source / part, ".jpg"):
            picture.patient, picture.split = f"{part}/{picture.patient}", split
            pictures.append(picture)
    return pictures


def find_aptos(source: Path) -> list[Picture]:
    """APTOS names no patients: every image is one of its own, or a group of groups.csv (id_code, group) where it is."""
    folder = source / "train_images"
    ending = ".jpg" if visible(folder, "*.jpg") else ".png"
    pictures = graded(source / "train.csv", ("id_code", "diagnosis"), folder, ending)
    if (source / "groups.csv").is_file():
        table = read_table(source / "groups.csv", ["id_code", "group"])
        groups = dict(zip(table["id_code"], table["group"], strict=True))
        for picture in pictures:
            picture.patient = groups.get(picture.patient) or picture.patient
    return pictures


def find_odir(source: Path) -> list[Picture]:
    """The class of each eye is in `labels`; the columns N to O are the patient's, both eyes taken together."""
    table = read_table(source / "full_df.csv", ["ID", "filename", "labels"])
    letters, pictures = list(ODIR_CLASSES), []
    for patient, name, label in zip(table["ID"], table["filename"], table["labels"], strict=True):
        found = re.findall(r"\w+", label)
        if len(found) != 1 or found[0] not in letters:
            raise DatasetError(f"{source / 'full_df.csv'}: {name} has the labels {label!r}; one of {letters} is wanted")
        path = inside(source / "preprocessed_images", name, source / "full_df.csv")
        pictures.append(Picture(path, patient, letters.index(found[0])))
    return pictures


class Layout(NamedTuple):
    """How a publisher lays a set: the table it is known by, who reads it, its tasks (the first if none is given)."""

    table: str
    find: Callable[[Path], list[Picture]]
    tasks: tuple[str, ...]
    card: dict[str, str]


OF_GRADES = ("referable", "grade", "severe")
LAYOUTS = {
    "eyepacs": Layout("trainLabels.csv", find_eyepacs, OF_GRADES, {
        "title": "Diabetic retinopathy (EyePACS)",
        "source": "Kaggle competition diabetic-retinopathy-detection",
        "licence": "Kaggle competition terms",
        "citation": "EyePACS and Kaggle, Diabetic Retinopathy Detection, 2015",
    }),
    "idrid": Layout("train_labels.csv", find_idrid, OF_GRADES, {
        "title": "Indian Diabetic Retinopathy Image Dataset",
        "source": "IDRiD, disease grading",
        "licence": "CC BY 4.0",
        "citation": "Porwal et al., Data 3(3), 2018",
    }),
    "aptos": Layout("train.csv", find_aptos, OF_GRADES, {
        "title": "Diabetic retinopathy (APTOS 2019)",
        "source": "Kaggle competition aptos2019-blindness-detection",
        "licence": "Kaggle competition terms",
        "citation": "Asia Pacific Tele-Ophthalmology Society and Kaggle, APTOS 2019 Blindness Detection, 2019",
    }),
    "odir": Layout("full_df.csv", find_odir, ("classes",), {
        "title": "Ocular Disease Intelligent Recognition (ODIR-5K)",
        "source": "Kaggle andrewmvd/ocular-disease-recognition-odir5k",
        "licence": "see the Kaggle page",
        "citation": "Peking University International Competition on Ocular Disease Intelligent Recognition, 2019",
    }),
}  # fmt: skip
TABLES = ", ".join(f"{layout.table} ({name})" for name, layout in LAYOUTS.items())


def layout_of(source: Path) -> str:
    """Whose layout a folder has, by its table."""
    for name, layout in LAYOUTS.items():
        if (source / layout.table).is_file():
            return name
    raise DatasetError(f"{source} holds none of {TABLES}; pass the folder with the table and the images' folder")


def pooled(sources: list[Path], main: str, args) -> tuple[list[Picture], list[dict]]:
    """The pictures of other sources, for pretraining only, and the cards of these sources.

    Two sources may number their patients alike, so the patients of another layout get its name in front. A second
    source of the same layout is taken to mean the same patients by the same names.
    """
    pictures, cards = [], []
    for source in sources:
        source = open_source(source, TABLES, args.out, KAGGLE)
        name = layout_of(source)
        for picture in LAYOUTS[name].find(source):
            picture.split = UNLABELLED
            picture.patient = picture.patient if name == main else f"{name}/{picture.patient}"
            pictures.append(picture)
        cards.append(LAYOUTS[name].card)
    return pictures, cards


def crop_to_disc(image: Image.Image) -> tuple[Image.Image, str]:
    """Cut the black border off and centre what is left on a black square.

    The disc is the largest bright area of the image after averaging over a twenty-fifth of its side: averaging and
    area together keep a noisy or lettered border out.
    """
    image = to_rgb(image)
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    smooth = ndimage.uniform_filter(gray, size=max(3, max(gray.shape) // 25))
    areas, count = ndimage.label(smooth > max(12.0, 0.25 * np.percentile(smooth, 95)))
    if count == 0:
        return image, "no disc found, kept whole"
    largest = 1 + int(np.argmax(np.bincount(areas.ravel())[1:]))
    rows, columns = ndimage.find_objects(areas)[largest - 1]
    cut = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    side = max(cut.size)
    square = Image.new("RGB", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square, "border cropped" if cut.size != image.size else ""


def labels_of(values: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, which rows have one, and which are positive, from grades or classes (N,)."""
    every = np.ones(len(values), bool)
    if task == "referable":
        return (values >= REFERABLE).astype(np.uint8), every, values >= REFERABLE
    if task == "severe":
        return (values >= SEVERE).astype(np.uint8), values > 0, values >= SEVERE
    return values, every, values >= (REFERABLE if task == "grade" else 1)


def main(args) -> None:
    source = open_source(args.source, TABLES, args.out, KAGGLE)
    name = layout_of(source)
    layout, task = LAYOUTS[name], args.task or LAYOUTS[name].tasks[0]
    if task not in layout.tasks:
        raise DatasetError(f"{layout.card['title']} has no labels for --task {task}; use {' or '.join(layout.tasks)}")
    more, cards = pooled(args.unlabelled, name, args)
    images, kept, report, work = read_images(layout.find(source) + more, crop_to_disc, 3, args)
    own = np.array([picture.split != UNLABELLED for picture in kept])
    if name == "aptos" and not (source / "groups.csv").is_file():
        report["tied"] = tie(list(compress(kept, own)), near_pairs(Rows(images, np.flatnonzero(own))))
        print(f"{report['tied']} images are near-equal to another and count as its patient")
    values = np.array([picture.label for picture in kept], np.uint8)
    labels, labelled, positive = labels_of(values, task)
    # The publisher's test part takes part in the draw and keeps its place.
    test, judged = np.array([picture.split == TEST for picture in kept]), labelled & own
    given = [None if each else UNLABELLED for each in judged]
    split = splits(kept, positive, args.seed, VALIDATION if test.any() else FRACTIONS, given)
    split[judged & test] = TEST
    labels[split == UNLABELLED] = 0
    # A patient who is judged is not pretrained on.
    patients = np.array([picture.patient for picture in kept])
    leaks = (split == UNLABELLED) & np.isin(patients, patients[np.isin(split, (VAL, TEST))])
    if leaks.any():
        report["notes"]["left out, unlabelled pictures of patients in val or test"] = int(leaks.sum())
    card = layout.card | TASKS[task] | {"modality": "retina"}
    for key in ("source", "licence", "citation"):
        card[key] = "; ".join(dict.fromkeys([card[key], *(other[key] for other in cards)]))
    rows = np.flatnonzero(~leaks)
    read = Converted(Rows(images, rows), [kept[row] for row in rows], report, work)
    grades = {} if task == "classes" else {"grades": np.where(own, values, -1).astype(np.int8)[rows]}
    finish(args, read, labels[rows], split[rows], card, **grades)


if __name__ == "__main__":
    parser = arguments(__doc__, "retina", 28, EXAMPLES)
    tasks = "grade 2 and above; 0 to 4; 3 and 4 against 1 and 2 with 0 unlabelled; ODIR's eight classes by eye"
    parser.add_argument("--task", choices=tuple(TASKS), help=f"{tasks} (referable, or classes for ODIR)")
    more = "other sources of the retina, in any of these layouts, used for pretraining only"
    parser.add_argument("--unlabelled", nargs="+", default=[], type=Path, help=more)
    add_available(parser)
    run(main, parser)
