"""MedMNIST v2 sets: the official download, or a local .npz, to the prepared format."""

import hashlib
import tempfile
import zipfile
import zlib
from pathlib import Path

import medmnist
import numpy as np
from common import arguments, finish, run
from conversion import Converted, Picture
from copies import pixel_hashes
from medmnist import INFO

from mocolayers.runtime import DatasetError

MODALITY = {
    "chestmnist": "chest",
    "pneumoniamnist": "chest",
    "retinamnist": "retina",
    "pathmnist": "histology",
    "breastmnist": "ultrasound",
}
TASK = {
    "binary-class": "binary",
    "multi-label, binary-class": "multilabel",
    "ordinal-regression": "ordinal",
    "multi-class": "multiclass",
}
CITATION = "Yang et al., MedMNIST v2, Scientific Data 10, 2023"
EXAMPLES = """  python data_scripts/medmnist_sets.py pneumoniamnist
  python data_scripts/medmnist_sets.py retinamnist --side 64 --name retinamnist_64
  python data_scripts/medmnist_sets.py pneumoniamnist --source pneumoniamnist.npz --allow-unverified"""


def official_md5(name: str, side: int) -> str:
    """The md5 that the medmnist package gives for the file of this size."""
    key = "MD5" if side == 28 else f"MD5_{side}"
    if key not in INFO[name]:
        raise DatasetError(f"{name} is published at 28, 64, 128 and 224 px, not at {side}; pass --side 28")
    return INFO[name][key]


def fetch(name: str, side: int, folder: Path) -> Path:
    """Let the medmnist package download the official file."""
    try:
        maker = getattr(medmnist, INFO[name]["python_class"])
        maker(split="train", download=True, size=side, root=str(folder))
    except Exception as error:
        # The package wraps what went wrong in advice of its own.
        cause = error.__context__ or error
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise DatasetError(
            f"{name} could not be downloaded ({first}); fetch the .npz elsewhere and pass --source FILE.npz"
        ) from None
    return folder / (f"{name}.npz" if side == 28 else f"{name}_{side}.npz")


def verified(path: Path, name: str, side: int, allow: bool) -> bool:
    """True if the file's md5 is the official one; False if it is not and that was allowed."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found == official_md5(name, side):
        return True
    if not allow:
        raise DatasetError(
            f"{path}: its md5 is {found}, the official {name} has {official_md5(name, side)}; "
            "download it again, or pass --allow-unverified if you trust this file"
        )
    print(f"warning: {path} is not the official file (md5 {found}); the card says so")
    return False


def read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, H, W, C), labels and split codes of the three splits in a row."""
    try:
        with np.load(path) as file:
            images = np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])
            labels = np.concatenate([file[f"{split}_labels"] for split in ("train", "val", "test")])
            sizes = [len(file[f"{split}_labels"]) for split in ("train", "val", "test")]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise DatasetError(f"{path} is damaged, or no .npz that holds train_images, train_labels, val_...") from None
    images = images[..., None] if images.ndim == 3 else images
    return images, labels, np.repeat(np.arange(3, dtype=np.uint8), sizes)


def main(args) -> None:
    name, info = args.set, INFO[args.set]
    with tempfile.TemporaryDirectory() as folder:
        if args.source and not args.source.is_file():
            raise DatasetError(f"{args.source} does not exist, or is a folder; --source wants the .npz file of {name}")
        path = args.source or fetch(name, args.side, Path(folder))
        sure = verified(path, name, args.side, args.allow_unverified)
        images, labels, split = read(path)
    # No patients are published; equal pixels are the one thing that can be known to belong together.
    patients = np.unique(pixel_hashes(images), return_inverse=True)[1].tolist()
    kept = [Picture(path, patient, None) for patient in patients]
    if images.shape[1] != args.side:
        raise DatasetError(f"{path} holds images of {images.shape[1]} px; pass --side for that size")
    task = TASK[info["task"]]
    labels = labels.astype(np.uint8) if task == "multilabel" else labels.reshape(-1)
    card = {
        "title": info["python_class"],
        "modality": MODALITY[name],
        "task": task,
        "classes": [info["label"][key] for key in sorted(info["label"], key=int)],
        "source": "MedMNIST v2",
        "licence": info["license"],
        "citation": CITATION,
        "verified": sure,
    }
    finish(args, Converted(images, kept, {}), labels, split, card)


if __name__ == "__main__":
    parser = arguments(__doc__, None, 28, EXAMPLES, files=False)
    parser.add_argument("set", choices=sorted(MODALITY), help="which MedMNIST set")
    parser.add_argument("--allow-unverified", action="store_true", help="accept a --source whose md5 is not official")
    run(main, parser)
