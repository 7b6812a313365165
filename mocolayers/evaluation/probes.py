"""Linear evaluation: logistic regression on frozen features."""

import functools
import warnings

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.scores import validation_score
from mocolayers.recipe import Evaluation
from mocolayers.runtime import resolve_device

TOLERANCE, MOST_STEPS = 1e-6, 20_000


def fit_probe(x: np.ndarray, classes: np.ndarray, task: str, penalty: float) -> Pipeline:
    """Standardise features (n, D) and fit classes (n, L): one model, or one per label of a multilabel task.

    At scikit-learn's own tolerance of 1e-4 L-BFGS stops early enough to move an AUC in its third digit; 1e-6 is out of
    reach in single precision. A label that is never or always shown is predicted as such.
    """
    logistic = LogisticRegression(C=penalty, tol=TOLERANCE, max_iter=MOST_STEPS)
    if task == "multilabel":
        model, target = OneVsRestClassifier(logistic), classes.astype(int)
    else:
        model, target = logistic, classes.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        return make_pipeline(StandardScaler(), model).fit(x.astype(float), target)


class GPUProbe:
    """The models of `fit_probe`, fitted together: the same sums, in double precision on a GPU, for the same solver."""

    def __init__(self, x: np.ndarray, classes: np.ndarray, task: str, penalty: float, device: torch.device) -> None:
        self.device, self.classes_ = device, np.flatnonzero(classes.any(axis=0))
        columns = classes[:, self.classes_]
        self.pair = task != "multilabel" and columns.shape[1] == 2
        self.exclusive = task != "multilabel" and not self.pair  # as in scikit-learn, one logit tells two classes apart
        self.always = columns.all(axis=0) & (task == "multilabel")
        z = torch.as_tensor(x, device=device).double()
        spread, self.mean = torch.std_mean(z, dim=0, correction=0)
        self.scale = torch.where(spread > 0, spread, 1)
        z = (z - self.mean) / self.scale
        y = torch.as_tensor(columns[:, 1:] if self.pair else columns, device=device).double()  # (n, K)
        loss = F.cross_entropy if self.exclusive else F.binary_cross_entropy_with_logits
        count = 1 if self.exclusive else y.shape[1]  # the mean over columns becomes their sum

        def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.as_tensor(flat, device=device).view(-1, y.shape[1]).requires_grad_()  # (D + 1, K), bias last
            mean = count * loss(torch.addmm(w[-1], z, w[:-1]), y) + w[:-1].square().sum() / (2 * penalty * len(z))
            mean.backward()
            return mean.item(), w.grad.flatten().cpu().numpy()

        about = {"gtol": TOLERANCE, "ftol": 64 * np.finfo(float).eps, "maxls": 50}
        about |= {"maxiter": MOST_STEPS, "maxfun": 10 * MOST_STEPS}
        found = minimize(value, np.zeros((z.shape[1] + 1) * y.shape[1]), method="L-BFGS-B", jac=True, options=about)
        self.weights = torch.as_tensor(found.x, device=device).view(-1, y.shape[1])

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """(n, L) probabilities of the classes in `classes_`."""
        z = (torch.as_tensor(x, device=self.device).double() - self.mean) / self.scale
        logits = torch.addmm(self.weights[-1], z, self.weights[:-1])
        p = (logits.softmax(dim=1) if self.exclusive else logits.sigmoid()).cpu().numpy()
        return np.where(self.always, 1.0, np.hstack([1 - p, p]) if self.pair else p)


def predict(probe: Pipeline | GPUProbe, x: np.ndarray, labels: int) -> np.ndarray:
    """(n, L) probabilities; 0 for a class that the probe was never shown."""
    found = np.zeros((len(x), labels))
    found[:, probe.classes_] = probe.predict_proba(x.astype(float))
    return found


def linear_evaluation(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation, device: str = "cpu"
) -> tuple[np.ndarray, float]:
    """(n_test, L) test probabilities of the probe whose C does best on validation, and that C.

    Args:
        features: (n, D) of "train", "val" and "test", rows as in `data.rows(split)`.
        rows: training rows whose labels may be used, see `label_subset`.
        device: where probes are fitted: an NVIDIA or AMD GPU; on any other device, scikit-learn does it.
    """
    x, labels = features["train"][np.searchsorted(data.rows("train"), rows)], len(data.classes)
    classes, truth = class_matrix(data, rows), class_matrix(data, data.rows("val"))
    place = resolve_device(device)
    fit = functools.partial(GPUProbe, device=place) if place.type == "cuda" else fit_probe
    probes = {penalty: fit(x, classes, data.task, penalty) for penalty in plan.penalties}
    reached = {penalty: validation_score(truth, predict(p, features["val"], labels)) for penalty, p in probes.items()}
    best = max(reached, key=reached.get)
    return predict(probes[best], features["test"], labels), best
