"""Breast histopathology (invasive ductal carcinoma) patches: the publisher's tree to the prepared format."""

import re

import numpy as np
from common import add_available, arguments, finish, read_images, run, splits
from conversion import Picture, to_rgb
from PIL import Image
from sources import ENDINGS, open_source, visible

from mocolayers.runtime import DatasetError

PATCH = 50
PUBLISHED = 277_524  # patches
PATIENTS = 279
KAGGLE = "paultimothymooney/breast-histopathology-images"
FILE = re.compile(r"(?P<patient>\d+)_idx\d+_x\d+_y\d+_class(?P<label>[01])\.\w+$")
CARD = {
    "title": "Breast histopathology patches (IDC)",
    "modality": "histology",
    "task": "binary",
    "classes": ["no IDC", "IDC"],
    "source": "Kaggle paultimothymooney/breast-histopathology-images",
    "licence": "see the Kaggle page",
    "citation": "Janowczyk and Madabhushi 2016; Cruz-Roa et al. 2014",
}
EXAMPLES = """  python data_scripts/breast_histology.py                                    # downloads from Kaggle
  python data_scripts/breast_histology.py --source ~/IDC_regular_ps50_idx5
  python data_scripts/breast_histology.py --source ~/IDC_regular_ps50_idx5 --side 48 --name breast_48"""


def find(source) -> list[Picture]:
    """Every patch as PATIENT/0|1/PATIENT_idx5_xX_yY_classC.png; folder and file name must agree."""
    pictures = []
    # The full archive holds a second copy of everything in a folder of the archive's own name.
    for path in (path for path in visible(source, "*/[01]/*") if path.suffix.lower() in ENDINGS):
        match = FILE.search(path.name)
        if not match or match["label"] != path.parent.name or match["patient"] != path.parent.parent.name:
            raise DatasetError(f"{path}: name and folder disagree; expected PATIENT/C/PATIENT_idx5_xX_yY_classC.png")
        pictures.append(Picture(path, match["patient"], int(match["label"])))
    if not pictures:
        raise DatasetError(f"{source} holds no PATIENT/0|1/*.png; pass the folder that holds the patients' folders")
    return pictures


def to_square(image: Image.Image) -> tuple[Image.Image, str, str]:
    """Patches from a slide's edge are smaller: mirror them to 50 x 50, so that no black border gives them away."""
    image = to_rgb(image)
    side = max(PATCH, *image.size)
    larger = f"patches larger than the publisher's {PATCH} px" if side > PATCH else ""
    if image.size == (side, side):
        return image, "", larger
    pad = ((0, side - image.height), (0, side - image.width), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), pad, mode="symmetric")), "edge patches filled by mirroring", larger


def main(args) -> None:
    pictures = find(open_source(args.source, "one folder per patient", args.out, KAGGLE))
    there = {picture.patient for picture in pictures}
    if len(pictures) < PUBLISHED and not args.available:
        print(f"note: of the publisher's {PUBLISHED} patches {len(pictures)} are here; if that is meant: --available")
    read = read_images(pictures, to_square, 3, args)
    read.report["listed"] = {"there": len(pictures), "of": PUBLISHED, "patients_lost_all": PATIENTS - len(there)}
    labels = np.array([picture.label for picture in read.kept])
    finish(args, read, labels, splits(read.kept, labels, args.seed, (0.6, 0.2, 0.2)), CARD)


if __name__ == "__main__":
    parser = arguments(__doc__, "breast_histology", 28, EXAMPLES)
    add_available(parser)
    run(main, parser)
