"""TODO mocolayers.evaluation.probes."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.scores import macro_auc
from mocolayers.recipe import Evaluation

MOST_NEWTON_WEIGHTS = 1024  # its matrix has as many rows and columns


def linear_evaluation(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple[np.ndarray, float]:
    """Logistic regression on frozen features.

    Args:
        features: see `encode_splits`; (n, D) per split.
        data: whose labels are used.
        rows: training rows whose labels may be used, see `label_subset`.
        plan: candidates for C; the best on validation is taken.
    Returns:
        (n_test, L) probabilities for the test rows, and the chosen C.
    """
    probe, _ = best_probe(features, data, rows, plan)
    return probe.predict(features["test"]), probe.penalty


def best_probe(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple["LinearProbe", float]:
    """The probe of `linear_evaluation` and its validation AUC; neither features nor labels of the test are needed."""
    inside = np.searchsorted(data.rows("train"), rows)
    x, classes = features["train"][inside], class_matrix(data, rows)
    truth = class_matrix(data, data.rows("val"))
    best, chosen = -np.inf, None
    for penalty in plan.penalties:
        model = LinearProbe(data.task, penalty).fit(x, classes)
        reached = float(np.nan_to_num(macro_auc(truth, model.predict(features["val"]))[0]))
        if reached > best:
            best, chosen = reached, model
    return chosen, best


class LinearProbe:
    """Standardised features and logistic regression: one model for exclusive classes, one per label for multilabel.

    Args:
        task: see `MedicalImages`.
        penalty: scikit-learn's C.
    """

    def __init__(self, task: str, penalty: float) -> None:
        self.task, self.penalty = task, penalty

    def fit(self, x: np.ndarray, classes: np.ndarray) -> "LinearProbe":
        """Fit on features (n, D) and classes (n, L)."""
        targets = classes.T if self.task == "multilabel" else [classes.argmax(axis=1)]
        self.models = [self._fit_one(x, target) for target in targets]
        self.labels = classes.shape[1]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n, L) probabilities."""
        if self.task == "multilabel":
            return np.stack([self._positive(model, x) for model in self.models], axis=1)
        model = self.models[0]
        full = np.zeros((len(x), self.labels))
        full[:, model.classes_.astype(int)] = model.predict_proba(x)
        return full

    def _fit_one(self, x: np.ndarray, target: np.ndarray):
        # A label that the subset never (or always) shows cannot be fitted; it is predicted at its rate.
        if (kinds := len(np.unique(target))) < 2:
            return float(target.mean())
        chosen = solver(len(x), x.shape[1], kinds)
        if chosen == "newton-cholesky":
            x = x.astype(float)  # in single precision its matrix can look singular
        model = LogisticRegression(C=self.penalty, max_iter=2000, solver=chosen)
        return make_pipeline(StandardScaler(), model).fit(x, target)

    @staticmethod
    def _positive(model, x: np.ndarray) -> np.ndarray:
        return np.full(len(x), model) if isinstance(model, float) else model.predict_proba(x)[:, 1]


def solver(rows: int, features: int, kinds: int) -> str:
    """Newton's method where rows outnumber a few weights: up to ten times as fast as L-BFGS, and exact."""
    weights = features * (kinds if kinds > 2 else 1)
    return "newton-cholesky" if weights < min(rows, MOST_NEWTON_WEIGHTS) else "lbfgs"
