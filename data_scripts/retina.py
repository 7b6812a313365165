"""Diabetic retinopathy, EyePACS (trainLabels.csv, train/) or IDRiD (train/, test/), to the prepared format.

EXIF orientation is not applied; images are cropped to the retina's disc on a black square.
"""

from pathlib import Path

import numpy as np
from common import arguments, finish, read_images, run, split_by_patient
from conversion import Picture, to_rgb
from PIL import Image
from scipy import ndimage
from sources import inside, open_source, read_table

from mocolayers.data.prepared import TEST
from mocolayers.runtime import DatasetError

REFERABLE = 2
KAGGLE = "competition:diabetic-retinopathy-detection"
EYEPACS = {
    "title": "Diabetic retinopathy (EyePACS)",
    "source": "Kaggle competition diabetic-retinopathy-detection",
    "licence": "Kaggle competition terms",
    "citation": "EyePACS and Kaggle, Diabetic Retinopathy Detection, 2015",
}
IDRID = {
    "title": "Indian Diabetic Retinopathy Image Dataset",
    "source": "IDRiD, disease grading",
    "licence": "CC BY 4.0",
    "citation": "Porwal et al., Data 3(3), 2018",
}
EXAMPLES = """  python data_scripts/retina.py --source ~/eyepacs
  python data_scripts/retina.py --source ~/idrid --name idrid --task grade"""


def find_eyepacs(source: Path) -> list[Picture]:
    """Both eyes carry the patient's number: ID_left.jpeg, ID_right.jpeg.

    The labels of the competition's test images were published later; they are used where their file is.
    """
    pictures = []
    for labels, part in (("trainLabels.csv", "train"), ("retinopathy_solution.csv", "test")):
        if part == "test" and not (source / labels).is_file():
            continue
        table = read_table(source / labels, ["image", "level"])
        for name, level in zip(table["image"], table["level"], strict=True):
            path = inside(source / part, f"{name}.jpeg")
            if not path.is_file():
                raise DatasetError(f"{source / labels} names {name}, but {path} does not exist")
            pictures.append(Picture(path, name.rsplit("_", 1)[0], int(level), grade=int(level)))
    return pictures


def find_idrid(source: Path) -> list[Picture]:
    """IDRiD names no patients and numbers its two parts alike: every image is a patient of its own, part included."""
    pictures = []
    for part in ("train", "test"):
        table = read_table(source / f"{part}_labels.csv", ["Image name", "Retinopathy grade"])
        for name, grade in zip(table["Image name"], table["Retinopathy grade"], strict=True):
            path = inside(source / part, f"{name.strip()}.jpg")
            if not path.is_file():
                raise DatasetError(f"{source / f'{part}_labels.csv'} names {name}, but {path} does not exist")
            split = TEST if part == "test" else None
            pictures.append(Picture(path, f"{part}/{name.strip()}", int(grade), split, int(grade)))
    return pictures


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


def main(args) -> None:
    source = open_source(
        args.source, "trainLabels.csv and train/ (EyePACS), or train_labels.csv and train/ (IDRiD)", args.out, KAGGLE
    )
    idrid = (source / "train_labels.csv").is_file()
    pictures = find_idrid(source) if idrid else find_eyepacs(source)
    # IDRiD names no patients, and published results rest on its seeded split: copies are left out, and not tied.
    images, kept, report = read_images(pictures, crop_to_disc, 3, args, tie=not idrid)
    patients = np.array([picture.patient for picture in kept])
    grades = np.array([picture.grade for picture in kept], np.uint8)
    fractions = (0.85, 0.15, 0.0) if idrid else (0.6, 0.15, 0.25)
    split = split_by_patient(patients, grades >= REFERABLE, args.seed, fractions)
    split[[picture.split == TEST for picture in kept]] = TEST
    labels, task = (grades >= REFERABLE).astype(np.uint8), ["not referable", "referable"]
    card = (IDRID if idrid else EYEPACS) | {"modality": "retina", "task": "binary", "classes": task}
    if args.task == "grade":
        labels, card = grades, card | {"task": "ordinal", "classes": [f"grade {g}" for g in range(5)]}
    arrays = {"images": images, "labels": labels, "patients": patients, "split": split, "grades": grades}
    finish(args, arrays, card, report)


if __name__ == "__main__":
    parser = arguments(__doc__, "retina", 28, EXAMPLES)
    parser.add_argument("--task", choices=("referable", "grade"), default="referable", help="grade 2 and above, or 0-4")
    run(main, parser)
