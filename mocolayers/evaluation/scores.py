"""Scores of predicted probabilities, and intervals that resample patients."""

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, f1_score

from mocolayers.data.prepared import say_once
from mocolayers.runtime import DatasetError

BINS = 10  # of predicted probabilities


def columns_of(task: str, labels: int) -> list[int]:
    """The columns worth comparing: the positive one of a binary task, whose other column mirrors it; else all."""
    return [1] if task == "binary" else list(range(labels))


def macro_auc(classes: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve (Mann-Whitney form), averaged over the classes that both occur and fail to occur.

    Args:
        classes: (n, L) booleans, one column per class.
        probabilities: (n, L) scores; ties count one half.
        weights: (R, n) non-negative row weights, one line per resample; None means a single line of ones.
    Returns:
        (R,) macro AUC per resample; NaN where no class has both kinds of rows.
    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(probabilities).any():
        raise ValueError(f"{np.isnan(probabilities).sum()} scores are NaN; did the training diverge?")
    weights = np.ones((1, len(classes))) if weights is None else weights
    areas = np.array([_auc(classes[:, c], probabilities[:, c], weights) for c in range(classes.shape[1])])  # (L, R)
    count = np.isfinite(areas).sum(axis=0)
    return np.where(count > 0, np.nansum(areas, axis=0) / np.maximum(count, 1), np.nan)


def _auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) weighted AUC of one class: the share of positive-negative weight pairs in the right order."""
    order = np.argsort(score)
    levels = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # where each group of equal scores starts
    weights, positive = weights[:, order], positive[order]
    on = np.add.reduceat(weights * positive, levels, axis=1)
    off = np.add.reduceat(weights * ~positive, levels, axis=1)
    below = off.cumsum(axis=1) - off / 2
    pairs = on.sum(axis=1) * off.sum(axis=1)
    return np.where(pairs > 0, (on * below).sum(axis=1) / np.maximum(pairs, 1e-12), np.nan)


def validation_score(classes: np.ndarray, probabilities: np.ndarray) -> float:
    """What a probe's C and a fine-tuning's checkpoint are chosen by: macro AUC, or minus the loss without one."""
    auc = macro_auc(classes, probabilities)[0]
    if np.isfinite(auc):
        return float(auc)
    say_once("the validation split shows one class only, so no AUC is defined: the choice is made by validation loss")
    return float(np.log(np.where(classes, probabilities, 1 - probabilities).clip(1e-12)).mean())


def scores(task: str, classes: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Macro AUC, macro F1 and, for grades, quadratic kappa (else NaN), of classes and probabilities (n, L)."""
    if task == "multilabel":
        truth, guess = classes, probabilities > 0.5
    else:
        truth, guess = classes.argmax(axis=1), probabilities.argmax(axis=1)
    f1, kappa = f1_score(truth, guess, average="macro", zero_division=0), np.nan
    if task == "ordinal":
        # Without the list of grades, one that nobody has would not count as a step.
        kappa = cohen_kappa_score(truth, guess, labels=range(classes.shape[1]), weights="quadratic")
    return {"auc": float(macro_auc(classes, probabilities)[0]), "f1": float(f1), "kappa": float(kappa)}


def patient_weights(patients: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """(R, n) how often each row occurs when patients are drawn with replacement."""
    names, member = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn[:, member].astype(float)


def patient_bootstrap(
    classes: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of `macro_auc` over draws of whole patients; equal seeds give arms equal draws.

    Raises:
        DatasetError: no draw has both kinds of rows for any class.
    """
    drawn = macro_auc(classes, probabilities, patient_weights(patients, resamples, seed))
    if np.isnan(drawn).all():
        raise DatasetError("the AUC is not defined: every test image is of the same class; use another split")
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def reliability(classes: np.ndarray, probabilities: np.ndarray, task: str) -> pd.DataFrame:
    """Does 70% mean 70%? Per bin in use the mean `probability`, the `observed` rate and the `share` of predictions."""
    columns = columns_of(task, classes.shape[1])
    p, truth = probabilities[:, columns].ravel().astype(float), classes[:, columns].ravel()
    table = pd.DataFrame({"bin": np.minimum((p * BINS).astype(int), BINS - 1), "probability": p, "observed": truth})
    grouped = table.groupby("bin")
    return grouped.mean().assign(share=grouped.size() / len(p)).reset_index(drop=True)


def calibration_error(classes: np.ndarray, probabilities: np.ndarray, task: str) -> float:
    """Expected calibration error: the mean gap of `reliability`, weighted by the share of predictions in a bin.

    Source: Naeini et al. 2015; Guo et al. 2017 (1706.04599), on class probabilities instead of the top one's.
    """
    table = reliability(classes, probabilities, task)
    return float((table["share"] * (table["probability"] - table["observed"]).abs()).sum())
