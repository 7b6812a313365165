"""Label subsets: which training images may be used with their labels, by patient, nested over fractions."""

import numpy as np

from mocolayers.data.prepared import MedicalImages, say_once
from mocolayers.runtime import DatasetError

POOL = 32  # patients among which the next one is chosen
BEST = 1 / 4  # share of them that is good enough: always the best one would make all subsets alike


def label_subset(data: MedicalImages, fraction: float, seed: int) -> np.ndarray:
    """Training rows whose labels may be used: whole patients, near the class mix, nested over fractions.

    The subset is the shortest prefix of one seeded order of patients that holds `fraction` of the training images and
    every class of the training split. 1% is part of 10%, 10% of 100%, and all arms get the same labels. A subset that
    must be larger than asked in order to hold every class says so in one line.

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
        say_once(f"{data.name}: {fraction:.1%} of the labels would miss a class; taking {taken}")
    return rows[chosen]


def class_matrix(data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """(n, L) booleans: which class each of the rows shows; a multilabel row may show none or several."""
    labels = np.asarray(data.labels[rows])
    if data.task == "multilabel":
        return labels.astype(bool)
    return labels[:, None] == np.arange(len(data.classes))


def _patient_order(classes: np.ndarray, patients: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seeded order of patients whose every prefix is close to the class mix; for each row the number of its patient.

    Of `POOL` patients drawn at random, next comes one of the `BEST` that bring the images so far nearest to the mix.
    Images per patient count like one more class: else patients with few images would come first.
    """
    names, member, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    shown = np.zeros((len(names), classes.shape[1]))
    np.add.at(shown, member, classes)
    excess = np.column_stack([shown - sizes[:, None] * classes.mean(axis=0), sizes - sizes.mean()])
    excess /= np.maximum(excess.std(axis=0), 1e-9)
    squares = np.square(excess).sum(axis=1)
    rng, order, balance = np.random.default_rng(seed), [], np.zeros(excess.shape[1])

    def take(pool: np.ndarray) -> int:
        # |balance + excess|^2 without |balance|^2, which is the same for all.
        distance = squares[pool] + 2 * excess[pool] @ balance
        few = max(1, round(BEST * len(pool)))
        place = np.argpartition(distance, few - 1)[rng.integers(few)]
        order.append(pool[place])
        balance[:] += excess[pool[place]]
        return place

    waiting = rng.permutation(len(names))
    # One patient of every class first, the rarest class before the others: small subsets shall hold all classes.
    for label in np.argsort(classes.sum(axis=0), kind="stable"):
        pool = waiting[shown[waiting, label] > 0][:POOL]
        if len(pool) and not shown[order, label].any():
            take(pool)
    waiting = waiting[~np.isin(waiting, order)]
    pool = waiting[:POOL].copy()
    for following in waiting[POOL:]:
        pool[take(pool)] = following
    while len(pool):
        pool = np.delete(pool, take(pool))
    return np.array(order), member


def subset_seed(seed: int, subset: int) -> int:
    """The seed of `label_subset` for the n-th of up to 1,000 subsets of a pretraining seed; no two pairs share one."""
    return seed * 1000 + subset
