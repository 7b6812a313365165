"""Scores of predicted probabilities, and intervals that resample patients."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import cohen_kappa_score, f1_score

from mocolayers.runtime import DatasetError


def macro_auc(classes: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, averaged over the classes that both occur and fail to occur.

    Args:
        classes: (n, L) booleans, one column per class.
        probabilities: (n, L) scores; ties count one half.
        weights: (R, n) non-negative row weights, one line per resample; None means a single line of ones.
    Returns:
        (R,) macro AUC per resample; NaN where no class has both kinds of rows.
    Source: the Mann-Whitney form of the area; for two classes both columns give the same number.
    """
    weights = np.ones((1, len(classes))) if weights is None else weights
    areas = [_auc(classes[:, c], probabilities[:, c], weights) for c in range(classes.shape[1])]
    areas = np.array(areas)  # (L, R)
    count = np.isfinite(areas).sum(axis=0)
    return np.where(count > 0, np.nansum(areas, axis=0) / np.maximum(count, 1), np.nan)


def _auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) weighted AUC of one class: the share of positive-negative weight pairs in the right order."""
    level = rankdata(score, method="dense").astype(int) - 1
    on, off = np.zeros((2, len(weights), level.max() + 1))
    for line in range(len(weights)):
        on[line] = np.bincount(level[positive], weights[line, positive], minlength=on.shape[1])
        off[line] = np.bincount(level[~positive], weights[line, ~positive], minlength=on.shape[1])
    below = off.cumsum(axis=1) - off / 2
    pairs = on.sum(axis=1) * off.sum(axis=1)
    return np.where(pairs > 0, (on * below).sum(axis=1) / np.maximum(pairs, 1e-12), np.nan)


def scores(task: str, classes: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The metrics of a task: macro AUC and macro F1 always, quadratic kappa for grades.

    Args:
        task: "binary", "multilabel", "ordinal" or "multiclass".
        classes: (n, L) booleans.
        probabilities: (n, L), rows adding up to 1 unless multilabel.
    """
    found = {"auc": float(macro_auc(classes, probabilities)[0])}
    if task == "multilabel":
        found["f1"] = float(f1_score(classes, probabilities > 0.5, average="macro", zero_division=0))
        return found
    truth, guess = classes.argmax(axis=1), probabilities.argmax(axis=1)
    found["f1"] = float(f1_score(truth, guess, average="macro", zero_division=0))
    if task == "ordinal":
        found["kappa"] = float(cohen_kappa_score(truth, guess, weights="quadratic"))
    return found


def patient_weights(patients: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """(R, n) how often each row occurs when patients are drawn with replacement."""
    names, member = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn[:, member].astype(float)


def patient_bootstrap(
    classes: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the macro AUC when patients, not images, are resampled.

    Args:
        classes, probabilities: (n, L), see `macro_auc`.
        patients: (n,) identifiers; images of one patient stay together in a resample.
        resamples: number of draws.
        seed: of the draws; the same seed gives the same draws, so that arms can be compared in pairs.
    Returns:
        The 2.5th and 97.5th percentile over the draws in which the AUC is defined.
    Raises:
        DatasetError: no draw has both kinds of rows for any class.
    """
    drawn = macro_auc(classes, probabilities, patient_weights(patients, resamples, seed))
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        raise DatasetError("the AUC is not defined: every test image is of the same class; use another split")
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def reliability(classes: np.ndarray, probabilities: np.ndarray, task: str, bins: int = 10) -> pd.DataFrame:
    """Does 70% mean 70%? Predicted probability against the observed rate, in bins of equal width.

    Args:
        classes: (n, L) booleans.
        probabilities: (n, L). A binary task is judged by its positive column; else all columns are pooled.
        task: see `MedicalImages`.
        bins: number of bins.
    Returns:
        One row per bin that is not empty: probability (mean in the bin), observed (rate), share (of all predictions).
    """
    columns = [1] if task == "binary" else list(range(classes.shape[1]))
    p, truth = probabilities[:, columns].ravel().astype(float), classes[:, columns].ravel()
    table = pd.DataFrame({"bin": np.minimum((p * bins).astype(int), bins - 1), "probability": p, "observed": truth})
    grouped = table.groupby("bin")
    return grouped.mean().assign(share=grouped.size() / len(p)).reset_index(drop=True)


def calibration_error(classes: np.ndarray, probabilities: np.ndarray, task: str, bins: int = 10) -> float:
    """Expected calibration error: the mean gap of `reliability`, weighted by the share of predictions in a bin.

    Source: Naeini et al. 2015; Guo et al. 2017 (1706.04599), on class probabilities instead of the top one's.
    """
    table = reliability(classes, probabilities, task, bins)
    return float((table["share"] * (table["probability"] - table["observed"]).abs()).sum())
