"""The one prepared data format: write it and load it.

A prepared data set is a folder `NAME/` with `images.npy` (N, H, W, C) uint8, `labels.npy` (N,) or (N, L),
`patients.npy` (N,), `split.npy` (N,) and `card.json`. Other arrays may stand beside them.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mocolayers.data.folders import check_name, check_target, tell_leftovers
from mocolayers.runtime import DatasetError, held

ARRAYS = ("images", "labels", "patients", "split")
TRAIN, VAL, TEST, UNLABELLED = 0, 1, 2, 3
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST, "unlabelled": UNLABELLED}
TASKS = ("binary", "multilabel", "ordinal", "multiclass")
SCRIPTS = Path(__file__).resolve().parents[2] / "data_scripts"
PHANTOMS = ("chest_phantom", "histology_phantom", "retina_phantom")
MEDMNIST = ("pneumoniamnist", "retinamnist", "breastmnist", "chestmnist", "pathmnist")
AUTO_ORDER = ("pneumoniamnist", "nih", "retina", "breast_histology", "chestmnist", "retinamnist")
REBUILD = (
    {name: f"phantoms.py --name {name}" for name in PHANTOMS}
    | {name: f"medmnist_sets.py {name}" for name in MEDMNIST}
    | {name: f"{name}.py --source PATH" for name in ("nih", "breast_histology", "retina", "pneumonia")}
)


class Rows:
    """Some rows of an array, looked up when they are read: a memory-mapped array stays on disk."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows
        self.dtype, self.ndim, self.shape = array.dtype, array.ndim, (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[self.rows[index]]


@dataclass(frozen=True)
class MedicalImages:
    """One prepared data set."""

    name: str  # of its folder, e.g. "pneumoniamnist"
    card: dict  # what is in `card.json`
    images: np.ndarray  # (N, H, W, C) uint8, memory-mapped
    labels: np.ndarray  # (N,) integers for binary, ordinal and multiclass tasks; (N, L) 0 and 1 for multilabel
    patients: np.ndarray  # (N,) identifiers; images of one patient share one
    split: np.ndarray  # (N,) 0 train, 1 val, 2 test, 3 unlabelled (used for pretraining only, labels are ignored)

    @property
    def task(self) -> str:
        return self.card["task"]

    @property
    def modality(self) -> str:
        return self.card["modality"]

    @property
    def classes(self) -> list[str]:
        return self.card["classes"]

    @property
    def side(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    @property
    def fingerprint(self) -> str:
        """Twelve characters that change with a label, a patient or the split, and with the images as they were made."""
        joined = "".join(self.card["sha256"][name] for name in ARRAYS)
        return hashlib.sha256(joined.encode()).hexdigest()[:12]

    def rows(self, *splits: str) -> np.ndarray:
        """Row numbers of the named splits, ascending: `rows("train")`, `rows("train", "unlabelled")`."""
        return np.flatnonzero(np.isin(self.split, [SPLITS[name] for name in splits]))

    def pretraining_rows(self) -> np.ndarray:
        """Rows a pretraining may look at: train and unlabelled images, never validation or test."""
        return self.rows("train", "unlabelled")

    def with_split(self, split: np.ndarray) -> "MedicalImages":
        """The same images split in another way, (N,) codes as in `split`; with a fingerprint of its own."""
        digest = hashlib.sha256(np.ascontiguousarray(split).tobytes()).hexdigest()
        card = self.card | {"counts": _counts(split), "sha256": self.card["sha256"] | {"split": digest}}
        return replace(self, card=card, split=split)


def home() -> Path:
    """This checkout, or where we are if the package was installed without one."""
    return SCRIPTS.parent if SCRIPTS.is_dir() else Path()


def data_folder() -> Path:
    """$MOCOLAYERS_DATA, else `data/` in `home`."""
    return Path(os.environ.get("MOCOLAYERS_DATA") or home() / "data")


def save_prepared(target: Path, arrays: dict[str, np.ndarray], card: dict, files: dict | None = None) -> Path:
    """Write a prepared data set so that a killed script never leaves half of one under its final name.

    Args:
        target: the folder to make, e.g. `data/nih`; nothing may be there.
        arrays: "images" (perhaps `Rows` on disk), "labels", "patients", "split", and any extra (N, ...) array such as
            "grades".
        card: title, modality (chest, histology, retina), task, classes, source, licence, citation; image side,
            counts and sha256 are filled in here.
        files: name and bytes of other files to put beside them.
    Returns:
        The target folder.
    Raises:
        DatasetError: when the arrays do not fit the card, a patient is in two splits, or something is in the target's
            place.
    """
    target = Path(target)
    check_target(target)
    _check_arrays(target.name, arrays, card)
    work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    tell_leftovers(target, "partial")
    try:
        work.mkdir()
        for name, array in arrays.items():
            (_save_images if name == "images" else np.save)(work / f"{name}.npy", array)
        full = card | {
            "name": target.name,
            "side": int(arrays["images"].shape[1]),
            "counts": _counts(arrays["split"]),
            "sha256": {name: _sha256(work / f"{name}.npy") for name in arrays},
        }
        text = json.dumps(full, indent=1, ensure_ascii=False) + "\n"
        for name, content in {"card.json": text.encode(), **(files or {})}.items():
            (work / name).write_bytes(content)
        with held(target.parent):  # another process may have made it meanwhile
            check_target(target)
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _save_images(path: Path, images: np.ndarray | Rows) -> None:
    """`np.save`, some rows at a time."""
    with open(path, "wb") as file:
        form = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": images.shape}
        np.lib.format.write_array_header_1_0(file, form)
        for first in range(0, len(images), 64):
            file.write(images[first : first + 64].tobytes())


def load(name: str = "auto", folder: str | Path | None = None, verify: bool = False) -> MedicalImages:
    """Load a prepared data set; phantoms and MedMNIST sets are made or downloaded on first use.

    Args:
        name: a folder name under the data folder, or "auto": the real set that is prepared, or the first of several,
            else a download of PneumoniaMNIST, else the synthetic chest phantom.
        folder: where prepared data sets stand (see `data_folder`).
        verify: read every byte, and refuse an array whose sha256 is not the card's. Otherwise labels, patients or a
            split that were changed by hand are taken as they are, with a line that says so and another fingerprint.
    Raises:
        DatasetError: unknown name, missing or damaged files; the message names the command that rebuilds them.
    """
    root = Path(folder or data_folder())
    if name == "auto":
        name = _choose(root)
    check_name(name)
    place = root / name
    if not place.is_dir():
        _make(name, root)
    return _read(place, verify)


def _choose(root: Path) -> str:
    prepared = [name for name in _prepared(root) if name not in PHANTOMS]
    if prepared:
        name = next((known for known in AUTO_ORDER if known in prepared), prepared[0])
        others = ", ".join(other for other in prepared if other != name)
        why = f"the first of those that are prepared; there are also {others}" if others else "the only one prepared"
        print(f'load("auto"): {name}, {why}')
        return name
    try:
        _make("pneumoniamnist", root)
        print('load("auto"): pneumoniamnist, downloaded because no real data set was prepared')
        return "pneumoniamnist"
    except DatasetError as error:
        print(f'load("auto"): chest_phantom (synthetic), because no real data set is prepared and {error}')
        return "chest_phantom"


def _prepared(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/card.json") if not path.parent.name.startswith("."))


def _make(name: str, root: Path) -> None:
    if name not in PHANTOMS + MEDMNIST:
        raise DatasetError(
            f"no prepared data set {name!r} in {root}. Prepared there: {', '.join(_prepared(root)) or 'none'}. "
            f"Made on demand: {', '.join(PHANTOMS + MEDMNIST)}. Build another with: {_remedy(name)}"
        )
    file, *arguments = REBUILD[name].split()
    if not (SCRIPTS / file).is_file():
        raise DatasetError(f"data_scripts/{file} is not part of the installed package; get it from the repository")
    command = [sys.executable, str(SCRIPTS / file), *arguments, "--out", str(root)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode and not (root / name).is_dir():  # or another process was faster
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DatasetError(f"could not make {name!r}: {last}. To see the whole message: {_remedy(name)}")


def _read(place: Path, verify: bool) -> MedicalImages:
    path, rebuild = place / "card.json", f"Move it away, and make it again: {_remedy(place.name)}"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        prepared, arrays, found = dict(card["sha256"]), {}, {}
        for name in ARRAYS:
            path = place / f"{name}.npy"
            array = np.lib.format.open_memmap(path, mode="r")
            arrays[name] = array if name == "images" else np.array(array)
            if verify or name != "images" or name not in prepared:  # the sha256 of all images takes long
                found[name] = _sha256(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: {error}. {rebuild}") from None
    for name in (name for name in found if found[name] != prepared.get(name)):
        if verify:
            raise DatasetError(f"{place / name}.npy: its sha256 is not the card's. {rebuild}")
        say_once(f"{place / name}.npy was changed after it was prepared: what is made from it is kept apart")
    _check_arrays(place.name, arrays, card, f". {rebuild}")
    card |= {"counts": _counts(arrays["split"]), "sha256": prepared | found}
    return MedicalImages(place.name, card, **arrays)


def _counts(split: np.ndarray) -> dict[str, int]:
    return {name: int((split == code).sum()) for name, code in SPLITS.items()}


say_once = functools.cache(print)  # a line that a sweep would otherwise repeat for every arm


def _check_arrays(name: str, arrays: dict[str, np.ndarray], card: dict, remedy: str = "") -> None:
    def fail(what: str) -> None:
        raise DatasetError(f"{name}: {what}{remedy}")

    if missing := {"title", "modality", "task", "classes", "source", "licence"} - set(card):
        fail(f"card.json lacks {', '.join(sorted(missing))}")
    task, images, labels = card["task"], arrays["images"], arrays["labels"]
    if task not in TASKS:
        fail(f"card.json: task {task!r} is not one of {', '.join(TASKS)}")
    classes, most = card["classes"], 2 if task == "binary" else np.inf
    if not isinstance(classes, list) or not 2 <= len(classes) <= most:
        fail(f"card.json: classes are {classes!r}, expected a list of two names or more, two for a binary task")
    height, width, channels = images.shape[1:] if images.ndim == 4 else (0, 1, 0)
    if images.dtype != np.uint8 or height != width or channels not in (1, 3):
        fail(f"images.npy is {images.dtype} {images.shape}, expected uint8 (N, side, side, 1 or 3)")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        fail(f"the arrays differ in length: {lengths}")
    several = task == "multilabel"
    wanted = (len(images), len(classes)) if several else (len(images),)
    if labels.shape != wanted or labels.dtype.kind not in "iub":
        fail(f"labels.npy is {labels.dtype} {labels.shape}, expected integers {wanted} for a {task} task")
    top = 1 if several else len(classes) - 1
    if labels.size and not (labels.min() >= 0 and labels.max() <= top):
        fail(f"labels.npy holds {labels.min()}..{labels.max()}, expected 0..{top}")
    if arrays["split"].dtype.kind not in "iu" or not np.isin(arrays["split"], list(SPLITS.values())).all():
        fail("split.npy holds values other than 0 train, 1 val, 2 test, 3 unlabelled")
    names, patients = np.unique(arrays["patients"], return_inverse=True)
    present = np.zeros((len(names), len(SPLITS)), bool)
    present[patients, arrays["split"]] = True
    # Unlabelled images are pretrained on, so they go with the training images.
    sides = np.column_stack([present[:, TRAIN] | present[:, UNLABELLED], present[:, VAL], present[:, TEST]])
    if (leaked := sides.sum(axis=1) > 1).any():
        fail(f"{leaked.sum()} patients are on two sides of the split, for example {names[leaked].tolist()[0]!r}")


def _remedy(name: str) -> str:
    return "python data_scripts/" + REBUILD.get(name, f"SCRIPT.py --source PATH --name {name}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
