"""The Kolmogorov-Smirnov distance between two models' outputs on the same rows, its controls and its interval.

Source: the paper gives no code; here D = sup_t |F_small(t) - F_large(t)| over predicted probabilities.
"""

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import entr, expit, log_softmax, logit

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.evaluation.scores import calibration_error, columns_of, patient_weights
from mocolayers.recipe import Evaluation
from mocolayers.training.runs import Run


def output_distances(
    run: Run, data: MedicalImages, plan: Evaluation, fraction: float, subset: int = 0, device: str = "auto"
) -> pd.DataFrame:
    """KS distance between the outputs of this encoder fine-tuned on some labels and on all, on the same test rows.

    Returns:
        The table of `compare_outputs`, with its `class`; of the mean a 95% interval `low`, `high` over test patients;
        a `note` that says what makes a row worthless; and calibration errors `ece` (few labels) and `ece_all`.
    """
    rows, columns = data.rows("test"), columns_of(data.task, len(data.classes))
    small = fine_tuned(run, data, fraction, subset, plan, device)[1]
    large, twin = (fine_tuned(run, data, 1.0, draw, plan, device)[1] for draw in (0, 1))
    classes, table = class_matrix(data, rows), compare_outputs(small, large, twin, data.task)
    table.insert(0, "class", [*(data.classes[column] for column in columns), "mean", "pooled"])
    interval = ks_interval([(small, large)], data.task, data.patients[rows], plan.resamples)
    table.loc[table["class"] == "mean", ["low", "high"]] = interval[1:]
    table["note"] = [*(_note(small[:, c], large[:, c], classes[:, c]) for c in columns), "", ""]
    table["ece"], table["ece_all"] = (calibration_error(classes, p, data.task) for p in (small, large))
    about = {"dataset": run.recipe.dataset, "arm": run.recipe.arm, "seed": run.recipe.seed, "fraction": fraction}
    return table.assign(**about, subset=subset, recipe=run.recipe.key, weights=run.weights_hash)


def compare_outputs(small: np.ndarray, large: np.ndarray, twin: np.ndarray, task: str) -> pd.DataFrame:
    """The distances of three models' (n, L) probabilities: a row per compared class, their mean, and all in one sample.

    Returns:
        Columns `ks`, of the model with few labels and the one with all; `floor`, of two models with all labels that
        differ only in their fine-tuning seed; `flattened`, of the model with all labels and itself made as flat as the
        first model, see `flatten`; `matched`, of the first model and that flattened one: what is left when
        flatness is equal; `temperature` does the flattening.
    """
    temperature = matching_temperature(large, small, task)
    flat = flatten(large, task, temperature)
    pairs = {"ks": (small, large), "floor": (large, twin), "flattened": (large, flat), "matched": (small, flat)}
    columns, found = columns_of(task, small.shape[1]), {}
    for name, (first, second) in pairs.items():
        each = ks_by_class(first, second, task)[0]
        # In one sample, errors of opposite sign in two classes can cancel.
        found[name] = [*each, each.mean(), ks_distance(first[:, columns].ravel(), second[:, columns].ravel())[0]]
    return pd.DataFrame(found).assign(temperature=temperature)


def _note(small: np.ndarray, large: np.ndarray, classes: np.ndarray) -> str:
    constant = [name for name, p in (("few", small), ("all", large)) if np.ptp(p) <= 1e-6]
    said = [f"the model with {name} labels says the same of every image" for name in constant]
    if classes.all() or not classes.any():
        said.append("the test split has one kind of image only")
    return "; ".join(said)


def ks_distance(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(R,) largest gap between the cumulative distributions of two models' (n,) probabilities for one class.

    Args:
        first, second: probabilities of the same n rows; ties are exact.
        weights: (R, n) non-negative row weights, one line per resample; None means a single line of ones.
    Raises:
        ValueError: rows that do not pair up, or values that are NaN or outside [0, 1].
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"both models must be judged on the same rows: {first.shape} and {second.shape} do not match")
    both = np.concatenate([first, second])
    if not ((both >= 0) & (both <= 1)).all():
        raise ValueError("probabilities have to be from 0 to 1; NaN comes from a training that diverged")
    weights = np.ones((1, len(first))) if weights is None else weights
    order = np.argsort(both)
    ends = np.flatnonzero(np.diff(both[order], append=np.inf))  # where each group of equal values ends
    gap = np.concatenate([weights, -weights], axis=1)[:, order].cumsum(axis=1)[:, ends]
    return np.abs(gap).max(axis=1) / weights.sum(axis=1)


def ks_by_class(first: np.ndarray, second: np.ndarray, task: str, weights: np.ndarray | None = None) -> np.ndarray:
    """(R, c) `ks_distance` of each class of `columns_of` between models (n, L); the mean is called their distance."""
    columns = columns_of(task, first.shape[1])
    return np.stack([ks_distance(first[:, c], second[:, c], weights) for c in columns], axis=1)


def ks_interval(
    pairs: list[tuple[np.ndarray, np.ndarray]], task: str, patients: np.ndarray, resamples: int = 500
) -> tuple[float, float, float]:
    """Mean distance over pairs of models, and its 95% interval: test patients and pairs are drawn with replacement.

    A resample has fewer different rows than the whole, which moves a small distance up: the interval is not centred.

    Args:
        pairs: (n, L) probabilities of the two models, one pair per label subset and seed; all of the same n rows.
    """
    weights = patient_weights(patients, resamples)
    drawn = np.stack([ks_by_class(*pair, task, weights).mean(axis=1) for pair in pairs])  # (pairs, resamples)
    chosen = np.random.default_rng(0).integers(len(pairs), size=drawn.shape)
    low, high = np.percentile(np.take_along_axis(drawn, chosen, axis=0).mean(axis=0), [2.5, 97.5])
    mean = np.mean([ks_by_class(*pair, task).mean() for pair in pairs])
    return float(mean), float(low), float(high)


def flatten(probabilities: np.ndarray, task: str, temperature: float) -> np.ndarray:
    """The same model (n, L), its logits divided by a temperature: above 1 less sure. Two classes rank as before."""
    safe = np.clip(probabilities.astype(float), 1e-12, 1 - 1e-12)
    if task == "multilabel":
        return expit(logit(safe) / temperature)
    return np.exp(log_softmax(np.log(safe) / temperature, axis=1))


def mean_entropy(probabilities: np.ndarray, task: str) -> float:
    """Mean entropy of a prediction in nats, per row (exclusive classes) or per row and label: high means flat."""
    p = probabilities.astype(float)
    return float(np.mean(entr(p) + entr(1 - p)) if task == "multilabel" else np.mean(entr(p).sum(axis=1)))


def matching_temperature(probabilities: np.ndarray, target: np.ndarray, task: str) -> float:
    """The temperature from 0.02 to 50 that makes `flatten(probabilities)` as flat as `target`, or as near as it can."""
    wanted = mean_entropy(target, task)

    def away(log_temperature: float) -> float:
        return abs(mean_entropy(flatten(probabilities, task, np.exp(log_temperature)), task) - wanted)

    found = minimize_scalar(away, bounds=np.log([0.02, 50.0]), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
