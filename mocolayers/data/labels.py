"""Label subsets: which training images may be used with their labels, by patient, nested over fractions."""

import functools

import numpy as np

from mocolayers.data.prepared import MedicalImages
from mocolayers.runtime import DatasetError


def label_subset(data: MedicalImages, fraction: float, seed: int) -> np.ndarray:
    """Training rows whose labels may be used: whole patients, stratified, nested over fractions.

    Patients are put in one seeded order in which every prefix is close to the class mix of the whole; the subset is the
    shortest prefix that holds `fraction` of the training images and every class that the training split holds. The
    order does not depend on the fraction, so 1% lies inside 10% inside 100%; nor on the method, so every arm sees the
    same labels. A subset that has to be larger than asked in order to hold every class says so in one line.

    Args:
        fraction: share of training images, in (0, 1].
        seed: which order of patients.
    Returns:
        Ascending row numbers into `data.images`.
    Raises:
        DatasetError: a fraction outside (0, 1], or a training split with a single class.
    """
    if not 0 < fraction <= 1:
        raise DatasetError(f"label fraction {fraction} is not in (0, 1]; give for example 0.01 for 1% of the labels")
    rows = data.rows("train")
    classes = class_matrix(data, rows)
    if classes.any(axis=0).sum() < 2 and data.task != "multilabel":
        raise DatasetError(f"{data.name}: every training label is the same class; rebuild it with a split that mixes")
    order, member = _patient_order(classes, data.patients[rows], seed)
    sizes = np.bincount(member, minlength=len(order))[order]
    seen = np.zeros((len(order), classes.shape[1]), bool)
    np.logical_or.at(seen, np.argsort(order)[member], classes)
    covered = np.logical_or.accumulate(seen, axis=0)
    need_images = int(np.searchsorted(sizes.cumsum(), fraction * len(rows) - 1e-9))
    need_classes = int(np.argmax((covered == covered[-1]).all(axis=1)))
    last = min(max(need_images, need_classes), len(order) - 1)
    chosen = np.isin(member, order[: last + 1])
    if need_classes > need_images:
        taken = f"{chosen.sum()} images ({chosen.mean():.1%})"
        _say_once(f"{data.name}: {fraction:.1%} of the labels would miss a class; taking {taken}")
    return rows[chosen]


@functools.cache
def _say_once(text: str) -> None:
    """Print a line that a sweep would otherwise repeat for every arm."""
    print(text)


def class_matrix(data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """(n, L) booleans: which class each of the rows shows; a multilabel row may show none or several."""
    labels = np.asarray(data.labels[rows])
    if data.task == "multilabel":
        return labels.astype(bool)
    return labels[:, None] == np.arange(len(data.classes))


def _patient_order(classes: np.ndarray, patients: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seeded, stratified order of patients and, for each row, the number of its patient."""
    names, member = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    has = np.zeros((len(names), classes.shape[1]), bool)
    np.logical_or.at(has, member, classes)
    rarity = classes.sum(axis=0)
    # A patient's stratum is the rarest class it shows; patients that show none form a stratum of their own.
    by_rarity = np.argsort(rarity, kind="stable")
    stratum = np.where(has.any(axis=1), has[:, by_rarity].argmax(axis=1), classes.shape[1])
    position = np.empty(len(names))
    for code in np.unique(stratum):
        inside = np.flatnonzero(stratum == code)
        position[rng.permutation(inside)] = (np.arange(len(inside)) + rng.random()) / len(inside)
    order = np.argsort(position, kind="stable")
    # One patient of every class goes to the front, so that the smallest subset never misses a class for long.
    front: list[int] = []
    for label in by_rarity:
        if has[front, label].any() or not has[:, label].any():
            continue
        front.append(int(order[has[order, label]][0]))
    front = sorted(front, key=lambda patient: position[patient])
    return np.concatenate([np.array(front, int), order[~np.isin(order, front)]]), member


def subset_seed(seed: int, subset: int) -> int:
    """The seed of `label_subset` for the n-th subset of a pretraining seed; no two pairs share one."""
    return seed * 1000 + subset
