"""Kermany's chest X-rays of children: the publisher's tree to the prepared format, bacteria against virus.

EXIF orientation is not applied and images are stretched to a square, as users of this set expect.
"""

import re
from pathlib import Path

import nih
import numpy as np
from common import FRACTIONS, VALIDATION, add_available, arguments, finish, read_images, run, splits
from conversion import Picture, gray
from sources import open_source, pictures_in

from mocolayers.data.prepared import TEST, UNLABELLED
from mocolayers.runtime import DatasetError

KAGGLE = "paultimothymooney/chest-xray-pneumonia"
PARTS = ("train", "val", "test")
# personN_bacteria_M, personN_virus_M; IM-N-M and NORMAL2-IM-N-M are two series of normal images.
FILE = re.compile(r"(?P<person>person\d+|(NORMAL\d-)?IM-\d+)(_(?P<kind>bacteria|virus))?")
CLASSES = {"type": ["virus", "bacteria"], "pneumonia": ["normal", "pneumonia"]}
CARD = {
    "title": "Chest X-rays of children (Kermany)",
    "modality": "chest",
    "task": "binary",
    "source": "Mendeley Data rscbjbr9sj, from Guangzhou Women and Children's Medical Center",
    "licence": "CC BY 4.0 as far as known; see the publisher's page",
    "citation": "Kermany et al., Cell 172(5), 2018",
}
EXAMPLES = """  python data_scripts/pneumonia.py --source ~/chest_xray --side 64
  python data_scripts/pneumonia.py --source ~/chest_xray --task pneumonia --name pneumonia_or_normal
  python data_scripts/pneumonia.py --source ~/chest_xray --split seeded --unlabelled ~/nih ~/nih_more
  python data_scripts/pneumonia.py                                    # downloads from Kaggle"""


def find(source: Path, task: str, seeded: bool = False) -> list[Picture]:
    """Every image, with the publisher's part and its number as the patient; in the task "type" normals are unlabelled.

    The publisher's test part is a given split, unless the split is `seeded`.

    A number is used for bacteria and for virus alike, so it may be one child or two: both count as one patient, which
    never lets a child into two splits.
    """
    root = source / "chest_xray" if (source / "chest_xray").is_dir() else source
    pictures = []
    for path in pictures_in(root):
        part, group = path.parts[-3:-1]
        if part not in PARTS or group not in ("NORMAL", "PNEUMONIA") or path.parent.parent.parent != root:
            continue
        match = FILE.match(path.name)
        if not match or (match["kind"] is None) != (group == "NORMAL"):
            raise DatasetError(f"{path}: name and folder disagree; expected PNEUMONIA/personN_bacteria|virus_M.jpeg")
        split = TEST if part == "test" and not seeded else None
        if task == "type" and group == "NORMAL":
            split = UNLABELLED
        label = group == "PNEUMONIA" if task == "pneumonia" else match["kind"] == "bacteria"
        pictures.append(Picture(path, f"{part}/{match['person']}", int(label), split))
    if not pictures:
        raise DatasetError(f"{root} holds no train/PNEUMONIA/*.jpeg; pass the folder that holds train/ and test/")
    return pictures


def others(source: Path) -> list[Picture]:
    """Images of NIH ChestX-ray14, for pretraining only; its numbers of patients are not those of this set."""
    return [Picture(picture.path, f"NIH/{picture.patient}", 0, UNLABELLED) for picture in nih.find(source)]


def main(args) -> None:
    source = open_source(args.source, "chest_xray/train and test", args.out, KAGGLE)
    seeded = args.split == "seeded"
    pictures = find(source, args.task, seeded)
    for number, more in enumerate(args.unlabelled, start=1):
        pictures += others(open_source(more, f"NIH tree {number}", args.out, nih.KAGGLE))
    read = read_images(pictures, gray, 1, args)
    labels = np.array([picture.label for picture in read.kept], np.uint8)
    split = splits(read.kept, labels, args.seed, FRACTIONS if seeded else VALIDATION)
    finish(args, read, labels, split, CARD | {"classes": CLASSES[args.task]})


if __name__ == "__main__":
    parser = arguments(__doc__, "pneumonia", 28, EXAMPLES)
    task = "bacteria or virus, normals for pretraining only; or pneumonia or normal, which tiny pixels nearly solve"
    parser.add_argument("--task", choices=tuple(CLASSES), default="type", help=f"{task} (%(default)s)")
    how = "the publisher's test part, which is harder, or a seeded split of all"
    parser.add_argument("--split", choices=("official", "seeded"), default="official", help=f"{how} (%(default)s)")
    more = "trees of NIH ChestX-ray14, used for pretraining only"
    parser.add_argument("--unlabelled", nargs="+", type=Path, default=[], metavar="PATH", help=more)
    add_available(parser)
    run(main, parser)
