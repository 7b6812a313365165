"""The Kolmogorov-Smirnov distance between two models' outputs on the same rows, its controls and its interval.

Source: the paper gives no code; here D = sup_t |F_small(t) - F_large(t)| over predicted probabilities.
"""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import entr, expit, log_softmax, logit
from scipy.stats import ks_2samp, rankdata

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.evaluation.scores import calibration_error, patient_weights
from mocolayers.recipe import Evaluation
from mocolayers.training.runs import Run


def output_distances(
    run: Run, data: MedicalImages, plan: Evaluation, fraction: float, subset: int = 0, device: str = "auto"
) -> pd.DataFrame:
    """KS distance between the outputs of this encoder fine-tuned on some labels and on all, on the same test rows.

    Args:
        run: a finished pretraining.
        data: whose test rows are used.
        plan, device: of the fine-tunings.
        fraction, subset: labels of the first model; the second has all of them.
    Returns:
        One row per compared class, then "mean" (over classes, with a 95% interval `low`, `high` that resamples test
        patients) and "pooled" (all classes in one sample). Columns: `ks`; `floor`, of two models with all labels that
        differ only in their fine-tuning seed; `flattened`, of the model with all labels and itself made as flat as the
        first model, which ranks alike; `matched`, of the first model and that flattened one: what is left when
        flatness is equal; `temperature` does the flattening; `note` says what makes a row worthless.
    """
    rows = data.rows("test")
    small = fine_tuned(run, data, fraction, subset, plan, device)[1]
    large, twin = (fine_tuned(run, data, 1.0, draw, plan, device)[1] for draw in (0, 1))
    table = compare_outputs(small, large, twin, data.task)
    names = [data.classes[column] for column in columns_of(data.task, len(data.classes))]
    table.insert(0, "class", [*names, "mean", "pooled"])
    classes = class_matrix(data, rows)
    table["note"] = [*_notes(small, large, classes, data.task), "", ""]
    interval = ks_interval([(small, large)], data.task, data.patients[rows], plan.resamples)
    table.loc[table["class"] == "mean", ["low", "high"]] = interval[1:]
    table["ece"], table["ece_all"] = (calibration_error(classes, p, data.task) for p in (small, large))
    return _about(run, table, fraction).assign(subset=subset)


def compare_outputs(small: np.ndarray, large: np.ndarray, twin: np.ndarray, task: str) -> pd.DataFrame:
    """The distances of `output_distances` from three models' (n, L) probabilities: classes, then mean, then pooled."""
    for p, owner in ((small, "the model with few labels"), (large, "the model with all"), (twin, "its twin")):
        check_probabilities(p, owner)
    temperature = matching_temperature(large, small, task)
    flat = flatten(large, task, temperature)
    pairs = {"ks": (small, large), "floor": (large, twin), "flattened": (large, flat), "matched": (small, flat)}
    columns = {}
    for name, (first, second) in pairs.items():
        each = ks_by_class(first, second, task)[0]
        columns[name] = [*each, each.mean(), ks_pooled(first, second, task)]
    return pd.DataFrame(columns).assign(temperature=temperature)


def _notes(small: np.ndarray, large: np.ndarray, classes: np.ndarray, task: str) -> list[str]:
    notes = []
    for column in columns_of(task, classes.shape[1]):
        said = []
        for p, name in ((small, "few"), (large, "all")):
            if constant_columns(p)[column]:
                said.append(f"the model with {name} labels says the same of every image")
        if classes[:, column].all() or not classes[:, column].any():
            said.append("the test split has one kind of image only")
        notes.append("; ".join(said))
    return notes


def _about(run: Run, table: pd.DataFrame, fraction: float) -> pd.DataFrame:
    recipe = run.recipe
    for place, (name, value) in enumerate(
        {"dataset": recipe.dataset, "arm": recipe.arm, "seed": recipe.seed, "fraction": fraction}.items()
    ):
        table.insert(place, name, value)
    return table.assign(recipe=recipe.key)


SHARPEST, FLATTEST = 0.02, 50.0  # temperatures tried


def ks_distance(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Largest gap between the cumulative distributions of two models' probabilities for one class.

    Ties are exact. A model that says the same of every row is a single step: D then only tells where the other model's
    outputs lie relative to it. `constant_columns` finds such models.

    Args:
        first, second: (n,) probabilities of the same n rows.
        weights: (R, n) non-negative row weights, one line per resample; None means a single line of ones.
    Returns:
        (R,) distances in [0, 1].
    Raises:
        ValueError: rows that do not pair up, or values that are NaN or outside [0, 1].
    """
    for name, p in (("first", first), ("second", second)):
        check_probabilities(p, f"the {name} model")
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"both models must be judged on the same rows: {first.shape} and {second.shape} do not match")
    if weights is None:
        return np.array([ks_2samp(first, second, method="asymp").statistic])
    level = rankdata(np.concatenate([first, second]), method="dense").astype(int) - 1
    gap = np.zeros((len(weights), level.max() + 1))
    for line, row in zip(gap, weights, strict=True):
        line += np.bincount(level, np.concatenate([row, -row]), minlength=len(line)) / row.sum()
    return np.abs(gap.cumsum(axis=1)).max(axis=1)


def check_probabilities(p: np.ndarray, owner: str) -> None:
    """Raise a ValueError that names the owner if a value is NaN or no probability."""
    wrong = ~((p >= 0) & (p <= 1))
    if wrong.any():
        nan = int(np.isnan(p).sum())
        what = f"{nan} NaN" if nan else f"{int(wrong.sum())} values outside [0, 1]"
        raise ValueError(f"probabilities of {owner} hold {what} among {p.size}; did its training diverge?")


def constant_columns(probabilities: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """(L,) True where a model (n, L) says the same of every row, so that a distance to it carries no information."""
    return np.ptp(probabilities, axis=0) <= tolerance


def columns_of(task: str, labels: int) -> list[int]:
    """The columns worth comparing: the positive one of a binary task, whose other column mirrors it; else all."""
    return [1] if task == "binary" else list(range(labels))


def ks_by_class(first: np.ndarray, second: np.ndarray, task: str, weights: np.ndarray | None = None) -> np.ndarray:
    """(R, c) distance of each compared class; its mean over classes is what we call the distance of two models.

    Args:
        first, second: (n, L) probabilities of the same rows.
        task, weights: see `columns_of`, `ks_distance`.
    """
    columns = columns_of(task, first.shape[1])
    return np.stack([ks_distance(first[:, c], second[:, c], weights) for c in columns], axis=1)


def ks_interval(
    pairs: list[tuple[np.ndarray, np.ndarray]], task: str, patients: np.ndarray, resamples: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """Mean distance over pairs of models, and its 95% interval over test patients and over the pairs.

    Args:
        pairs: (n, L) probabilities of the two models, one pair per label subset and seed; all of the same n rows.
        task: see `columns_of`.
        patients: (n,) identifiers.
        resamples: each draws patients, and draws as many pairs as there are, both with replacement.
        seed: of the draws.
    Returns:
        Mean over pairs of the mean over classes, and the 2.5th and 97.5th percentile of its resamples. A resample has
        fewer different rows than the whole, which moves a small distance up: the interval is not centred.
    """
    weights = patient_weights(patients, resamples, seed)
    drawn = np.stack([ks_by_class(*pair, task, weights).mean(axis=1) for pair in pairs])  # (pairs, resamples)
    chosen = np.random.default_rng(seed).integers(len(pairs), size=drawn.shape)
    low, high = np.percentile(np.take_along_axis(drawn, chosen, axis=0).mean(axis=0), [2.5, 97.5])
    mean = np.mean([ks_by_class(*pair, task).mean() for pair in pairs])
    return float(mean), float(low), float(high)


def ks_pooled(first: np.ndarray, second: np.ndarray, task: str) -> float:
    """Distance of the compared classes' probabilities put into one sample of n * c numbers per model.

    Errors of opposite sign in two classes can cancel here, which they cannot in the mean over classes.
    """
    columns = columns_of(task, first.shape[1])
    return float(ks_distance(first[:, columns].ravel(), second[:, columns].ravel())[0])


def flatten(probabilities: np.ndarray, task: str, temperature: float) -> np.ndarray:
    """The same model with its logits divided by a temperature: above 1 it is less sure, and ranks rows as before.

    Args:
        probabilities: (n, L).
        task: "multilabel" divides each label's logit; otherwise rows go on adding up to 1.
    """
    safe = np.clip(probabilities.astype(float), 1e-12, 1 - 1e-12)
    if task == "multilabel":
        return expit(logit(safe) / temperature)
    return np.exp(log_softmax(np.log(safe) / temperature, axis=1))


def mean_entropy(probabilities: np.ndarray, task: str) -> float:
    """Mean entropy of a prediction in nats, per row (exclusive classes) or per row and label: high means flat."""
    p = probabilities.astype(float)
    return float(np.mean(entr(p) + entr(1 - p)) if task == "multilabel" else np.mean(entr(p).sum(axis=1)))


def matching_temperature(probabilities: np.ndarray, target: np.ndarray, task: str) -> float:
    """The temperature at which `flatten(probabilities)` is as flat as `target` is, between 0.02 and 50."""
    wanted = mean_entropy(target, task)

    def excess(log_temperature: float) -> float:
        return mean_entropy(flatten(probabilities, task, np.exp(log_temperature)), task) - wanted

    low, high = np.log(SHARPEST), np.log(FLATTEST)
    if excess(low) >= 0 or excess(high) <= 0:
        return SHARPEST if excess(low) >= 0 else FLATTEST
    return float(np.exp(brentq(excess, low, high, xtol=1e-6)))
