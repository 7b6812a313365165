"""What properties of the released code do to a conclusion on these data: the same number as released and soundly.

Each control changes one property: of the evaluation (E) or of the objective and training (O). The property of the
analysis (A1, RBF-CKA with an absolute bandwidth) is in similarity.csv: "released" beside "linear", each with its null.
"""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from mocolayers.data.labels import class_matrix, label_subset, subset_seed
from mocolayers.data.prepared import MedicalImages, load
from mocolayers.evaluation.features import run_features
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc, patient_weights
from mocolayers.recipe import Evaluation
from mocolayers.training.runs import Run
from study import protocol
from study.report import over_seeds
from study.run import Cell, draw

BASE, FEW = "moco", 0.01
MINUS = ", minus MoCo's"
LINEAR = f"linear AUC at {FEW:.0%}"
STARTS = f"{LINEAR}, all without zero_init_residual"
ABOUT = ["code", "property", "judged_on", "quantity", "seed", "arm"]


@dataclass(frozen=True)
class Setting:
    """A data set and seed, as a cell, and the arms: MoCo, and those to compare with it."""

    cell: Cell
    arms: tuple[str, ...] = (BASE, "mse")

    @functools.cached_property
    def data(self) -> MedicalImages:
        return draw(load(self.cell.dataset), self.cell.seed)

    def run(self, arm: str, **changes) -> Run:
        """The finished pretraining of an arm; trained on first use."""
        return replace(self.cell, arm=arm, changes=self.cell.changes | changes).trained()[0]

    def subsets(self, fraction: float) -> list[np.ndarray]:
        """The label subsets of the seed, as linear evaluation takes them."""
        count = self.cell.plan.subsets if fraction < 1 else 1
        return [label_subset(self.data, fraction, subset_seed(self.cell.seed, n)) for n in range(count)]

    def linear_auc(self, run: Run, subsets: list[np.ndarray]) -> float:
        """Test AUC of linear evaluation, the mean over label subsets."""
        features = run_features(run, self.data)[-1]
        return float(np.mean([probe_auc(features, self.data, rows, self.cell.plan) for rows in subsets]))


def auc_on_test(data: MedicalImages, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(R,) macro AUC of (n, L) test probabilities under (R, n) weights of the test rows."""
    return macro_auc(class_matrix(data, data.rows("test")), probabilities, weights)


def probe_auc(features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation) -> float:
    """Test AUC of linear evaluation with the labels of some rows; one half if they show one class only."""
    if not np.ptp(data.labels[rows], axis=0).any():
        return 0.5
    return float(auc_on_test(data, linear_evaluation(features, data, rows, plan)[0])[0])


def _row(quantity: str, released: float, sound: float, arm: str = "") -> dict:
    return {"arm": arm, "quantity": quantity, "as_released": float(released), "sound": float(sound)}


def _by_arm(quantity: str, values: dict[str, tuple[float, float]]) -> Iterator[dict]:
    """A row per arm, and for each stage arm its difference to MoCo, which is the conclusion that may move."""
    for arm, (released, sound) in values.items():
        yield _row(quantity, released, sound, arm)
        if arm != BASE:
            yield _row(quantity + MINUS, released - values[BASE][0], sound - values[BASE][1], arm)


def aliased_shuffle(count: int, seed: int) -> np.ndarray:
    """(count,) what numpy's shuffle leaves of 0, 1, 2 ... in a torch tensor.

    numpy swaps two places by reading both and then writing both. Of a tensor it reads views, so the second write copies
    what the first has just put there: one value is lost, the other is there twice. The first k places end up with
    values below k only, since each place is swapped with one before it.
    """
    places = torch.arange(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy says that this may duplicate; that is the point
        np.random.RandomState(seed).shuffle(places)
    return places.numpy()


def released_subset(data: MedicalImages, fraction: float, seed: int, number: int = 0) -> np.ndarray:
    """Training rows as the released code draws a label fraction; neither sorted nor all different.

    The publisher's order is by patient and then class in histology (patients in an order that the seed draws), and by
    class in retina.
    """
    rows = data.rows("train")
    names, patient = np.unique(data.patients[rows], return_inverse=True)
    patient, labels = np.random.default_rng(seed).permutation(len(names))[patient], data.labels[rows]
    rows = rows[np.lexsort((labels, patient) if data.modality == "histology" else (patient, labels))]
    return rows[aliased_shuffle(len(rows), subset_seed(seed, number))[: int(len(rows) * fraction)]]


def label_draw(setting: Setting) -> Iterator[dict]:
    """E1: the smallest label subset, drawn through a shuffle that aliases, against whole patients, stratified."""
    data = setting.data
    if data.modality not in ("histology", "retina"):
        return
    released = [released_subset(data, FEW, setting.cell.seed, n) for n in range(setting.cell.plan.subsets)]
    both = released, setting.subsets(FEW)
    counted = {"different images": np.arange(len(data.split)), "patients": data.patients, "classes": data.labels}
    for name, what in counted.items():
        yield _row(name, *(np.mean([len(np.unique(what[rows])) for rows in subsets]) for subsets in both))
    runs = {arm: setting.run(arm) for arm in setting.arms}
    yield from _by_arm(LINEAR, {arm: tuple(setting.linear_auc(run, s) for s in both) for arm, run in runs.items()})


def released_interval(draws: np.ndarray) -> tuple[float, float]:
    """Mean -+ 1.96 std / sqrt(R) of R resampled statistics: how well their mean is known, not the statistic.

    For NIH the released code takes the std over (R, 14) class AUCs together. Classes differ, which widens the interval
    to about the right width, by accident.
    """
    half = 1.96 * draws.std() / np.sqrt(len(draws))
    return float(draws.mean() - half), float(draws.mean() + half)


def interval_width(setting: Setting) -> Iterator[dict]:
    """E4: both intervals of the same resampled differences to MoCo, on every label subset of linear evaluation."""
    base = _resampled(setting, BASE)
    for arm in setting.arms[1:]:
        differences = [other - own for other, own in zip(_resampled(setting, arm), base, strict=True)]
        differences = [d[np.isfinite(d)] for d in differences]
        ends = np.array([(released_interval(d), np.percentile(d, [2.5, 97.5])) for d in differences])  # (n, 2, 2)
        widths, clear = ends[..., 1] - ends[..., 0], (ends[..., 0] > 0) | (ends[..., 1] < 0)
        released, sound = widths.mean(axis=0)
        yield _row("interval width", released, sound, arm)
        yield _row("share of comparisons clear of zero", *clear.mean(axis=0), arm)


def _resampled(setting: Setting, arm: str) -> list[np.ndarray]:
    """(R,) resampled test AUCs per label fraction and subset; the same patients for every arm."""
    data, plan, features = setting.data, setting.cell.plan, run_features(setting.run(arm), setting.data)[-1]
    weights = patient_weights(data.patients[data.rows("test")], plan.resamples)
    every = [rows for fraction in plan.fractions for rows in setting.subsets(fraction)]
    return [auc_on_test(data, linear_evaluation(features, data, rows, plan)[0], weights) for rows in every]


def unequal_starts(setting: Setting) -> Iterator[dict]:
    """O3: the variants start with zero_init_residual and MoCo without it, against all without."""
    subsets, found = setting.subsets(FEW), {}
    for arm in setting.arms:
        runs = [setting.run(arm, zero_init_residual=start) for start in (arm != BASE, False)]
        found[arm] = tuple(setting.linear_auc(run, subsets) for run in runs)
    yield from _by_arm(STARTS, found)


# Code: its control, the property, and the quantity that the figure shows, with its unit.
CONTROLS = {
    "E1": (label_draw, "labels drawn with duplicates from the first rows", LINEAR, "AUC"),
    "E4": (interval_width, "an interval of 1.96 std / sqrt(R)", "share of comparisons clear of zero", "share"),
    "O3": (unequal_starts, "MoCo and its variants start differently", STARTS + MINUS, "AUC"),
}


def control(setting: Setting) -> pd.DataFrame:
    """The rows of all controls for one data set and seed: `ABOUT`, as_released, sound."""
    about = {"judged_on": setting.cell.dataset, "seed": setting.cell.seed}
    rows = []
    for code, (compare, said, *_) in CONTROLS.items():
        rows += [about | {"code": code, "property": said} | row for row in compare(setting)]
    return pd.DataFrame(rows, columns=[*ABOUT, "as_released", "sound"])


def moved(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of each quantity as released and soundly, and their `difference` with its interval."""
    table = table.fillna({"arm": ""}).assign(difference=lambda t: t["as_released"] - t["sound"])
    keys = [name for name in ABOUT if name != "seed"]
    means = table.groupby(keys, as_index=False)[["as_released", "sound"]].mean()
    return means.merge(over_seeds(table, "difference", protocol.RATIO).drop(columns=["p", "p_equal"]), on=keys)
