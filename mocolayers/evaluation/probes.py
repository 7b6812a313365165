"""Linear evaluation: logistic regression on frozen features."""

import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.scores import validation_score
from mocolayers.recipe import Evaluation


def fit_probe(x: np.ndarray, classes: np.ndarray, task: str, penalty: float) -> Pipeline:
    """Standardise features (n, D) and fit classes (n, L): one model, or one per label of a multilabel task.

    At scikit-learn's own tolerance of 1e-4 L-BFGS stops early enough to move an AUC in its third digit; 1e-6 is out of
    reach in single precision. A label that is never or always shown is predicted as such.
    """
    logistic = LogisticRegression(C=penalty, tol=1e-6, max_iter=20_000)
    if task == "multilabel":
        model, target = OneVsRestClassifier(logistic), classes.astype(int)
    else:
        model, target = logistic, classes.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        return make_pipeline(StandardScaler(), model).fit(x.astype(float), target)


def predict(probe: Pipeline, x: np.ndarray, labels: int) -> np.ndarray:
    """(n, L) probabilities; 0 for a class that the probe was never shown."""
    found = np.zeros((len(x), labels))
    found[:, probe.classes_] = probe.predict_proba(x.astype(float))
    return found


def best_probe(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple[Pipeline, float, float]:
    """The probe with the best C on validation, its `validation_score` there, and that C; the test split is not needed.

    Args:
        features: (n, D) of "train" and "val", rows as in `data.rows(split)`.
        rows: training rows whose labels may be used, see `label_subset`.
    """
    x, labels = features["train"][np.searchsorted(data.rows("train"), rows)], len(data.classes)
    classes, truth = class_matrix(data, rows), class_matrix(data, data.rows("val"))
    probes = {penalty: fit_probe(x, classes, data.task, penalty) for penalty in plan.penalties}
    reached = {penalty: validation_score(truth, predict(p, features["val"], labels)) for penalty, p in probes.items()}
    best = max(reached, key=reached.get)
    return probes[best], reached[best], best


def linear_evaluation(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple[np.ndarray, float]:
    """(n_test, L) test probabilities of `best_probe`, and its C."""
    probe, _, penalty = best_probe(features, data, rows, plan)
    return predict(probe, features["test"], len(data.classes)), penalty
