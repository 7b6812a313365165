"""Centred kernel alignment (CKA): how alike two sets of features of the same rows are, with its null and its error.

Source: Kornblith et al. 2019 (1905.00414); debiased as the product of U-centred matrices (Song et al. 2012, JMLR 13).
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist
from scipy.stats import norm
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.features import STAGES, stage_features
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.recipe import Evaluation
from mocolayers.training.runs import Run

ROWS = 2000  # a kernel matrix has as many rows and columns
MEDIAN_ROWS = 1000
FEWEST = 4  # rows; debiased CKA divides by their number minus 3


def feature_reuse(
    run: Run, data: MedicalImages, plan: Evaluation, fraction: float, device: str = "auto"
) -> pd.DataFrame:
    """How alike the test features are before and after fine-tuning, per stage, with what it has to be read against.

    Returns:
        One row per stage: `linear` is the debiased linear CKA with its 95% interval `low`, `high` over test patients;
        `biased` (the usual estimate) and `released` are other settings; `null`, `biased_null` and `released_null` are
        CKA with permuted rows; `twin` is the CKA of two fine-tunings of this encoder that differ in their draw; `moved`
        is how far the stage's weights went, relative to their norm.
    """
    rows = data.rows("test")
    rows = rows[some_rows(len(rows))]
    before = run.load_encoder()
    after, twin = (fine_tuned(run, data, fraction, draw, plan, device)[0].encoder for draw in (0, 1))
    features = [stage_features(encoder, data, rows, device=device) for encoder in (before, after, twin)]
    about = {"dataset": run.recipe.dataset, "arm": run.recipe.arm, "seed": run.recipe.seed, "fraction": fraction}
    permuted, found = np.random.default_rng(0).permutation(len(rows)), []
    for stage, moved, x, y, z in zip(STAGES, weights_moved(before, after), *features, strict=True):
        row = about | {"stage": stage, "moved": moved, "twin": cka(y, z)}
        row |= {"linear": cka(x, y), "biased": cka(x, y, debiased=False)}
        row |= {"null": cka_null(x, y).mean(), "biased_null": cka_null(x, y, debiased=False).mean()}
        row["released"] = released_cka(x, y, max(1, plan.resamples // 50))
        row["released_null"] = released_cka(x, y[permuted], 1)
        row["low"], row["high"] = patient_interval(
            lambda half, x=x, y=y: cka(x[half], y[half]), data.patients[rows], plan.resamples // 10
        )
        found.append(row | {"recipe": run.recipe.key, "weights": run.weights_hash})
    return pd.DataFrame(found)


def weights_moved(before: nn.Module, after: nn.Module) -> list[float]:
    """Per stage the distance between two encoders' weights, divided by the norm of the first one's."""
    found = []
    for stage in STAGES:
        layers = (getattr(encoder, f"layer{stage}") for encoder in (before, after))
        first, second = (torch.cat([p.detach().cpu().flatten() for p in layer.parameters()]) for layer in layers)
        found.append(float((second - first).norm() / first.norm()))
    return found


def some_rows(count: int, most: int = ROWS) -> np.ndarray:
    """Numbers of at most `most` of `count` rows, drawn from a fixed seed: the same ones for every set of features."""
    return np.arange(count) if count <= most else np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def cka(
    x: np.ndarray, y: np.ndarray, kernel: str = "linear", sigma: float | None = None, debiased: bool = True
) -> float:
    """CKA of two feature sets; 1 for equal geometry, about 0 for unrelated features when debiased.

    Args:
        x, y: (n, d) and (n, d') features of the same rows in the same order; of more than 2,000, `some_rows` are used.
        kernel: "linear", or "rbf" for exp(-distance^2 / (2 sigma^2)).
        sigma: RBF bandwidth; None is each set's own median distance, which makes it blind to scale. The released code
            uses 0.8.
        debiased: the unbiased estimate of each HSIC; otherwise the usual one, which grows as d / n does.
    Returns:
        The CKA, or NaN where it says nothing: features that do not vary, or an RBF kernel so narrow that no row has
        a neighbour (debiased).
    Raises:
        ValueError: rows that do not pair up, too few rows, values that are not finite, an unknown kernel.
    """
    if len(x) != len(y):
        raise ValueError(f"features must be of the same n rows in the same order, not of {len(x)} and {len(y)} rows")
    units = (_unit_kernel(z, kernel, sigma, debiased) for z in (x, y))
    return float(np.vdot(*units))


def _unit_kernel(
    x: np.ndarray, kernel: str = "linear", sigma: float | None = None, debiased: bool = True
) -> np.ndarray:
    """The centred kernel matrix, divided by its norm; NaN where it is constant off its diagonal, up to rounding."""
    x = np.asarray(x, float)
    if x.ndim != 2 or len(x) < FEWEST:
        raise ValueError(f"CKA needs features (n, d) of at least {FEWEST} rows, not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"the features hold {(~np.isfinite(x)).sum()} values that are NaN or infinite")
    x = x[some_rows(len(x))]
    n = len(x)
    if kernel == "linear":
        x = x - x.mean(axis=0)  # changes nothing but the rounding
        k = x @ x.T
    elif kernel == "rbf":
        width = sigma or median_distance(x)
        k = rbf_kernel(x, gamma=1 / (2 * width**2)) if width else np.ones((n, n))
    else:
        raise ValueError(f"kernel {kernel!r}: choose 'linear' or 'rbf'")
    rounding = 1e-12 * n * np.square(np.diag(k)).sum()
    if debiased:
        np.fill_diagonal(k, 0)
        means = k.sum(axis=0) / (n - 2)
        k = k - means - means[:, None] + means.sum() / (n - 1)
        np.fill_diagonal(k, 0)
    else:
        means = k.mean(axis=0)
        k = k - means - means[:, None] + means.mean()
    size = np.vdot(k, k)
    return k / np.sqrt(size) if size > rounding else np.full_like(k, np.nan)


def median_distance(x: np.ndarray) -> float:
    """Median Euclidean distance between different rows, of at most 1,000 evenly spaced ones."""
    return float(np.median(pdist(x[:: -(-len(x) // MEDIAN_ROWS)])))


def cka_null(x: np.ndarray, y: np.ndarray, draws: int = 20, **options) -> np.ndarray:
    """(draws,) CKA after the rows of y were permuted: what features of these shapes score when nothing pairs up."""
    rng = np.random.default_rng(0)
    k, m = (_unit_kernel(z, **options) for z in (x, y))
    orders = [rng.permutation(len(m)) for _ in range(draws)]
    return np.array([np.vdot(k, m[np.ix_(order, order)]) for order in orders])


def released_cka(x: np.ndarray, y: np.ndarray, draws: int = 50) -> float:
    """CKA as the released code measures it: RBF, sigma 0.8 absolute, the mean of 50 draws of 1,000 rows."""
    rng, rows = np.random.default_rng(0), 1000
    if len(x) <= rows:
        return cka(x, y, "rbf", sigma=0.8, debiased=False)
    drawn = [rng.choice(len(x), rows, replace=False) for _ in range(draws)]
    return float(np.mean([cka(x[part], y[part], "rbf", sigma=0.8, debiased=False) for part in drawn]))


def patient_interval(
    statistic: Callable[[np.ndarray], float], patients: np.ndarray, draws: int = 50
) -> tuple[float, float]:
    """95% interval of a statistic of row numbers, from random halves of the patients (the delete-half jackknife).

    The bootstrap repeats rows, and repeated rows are alike whatever the features are, which would pull every CKA up.
    """
    names, member = np.unique(patients, return_inverse=True)
    rng, whole = np.random.default_rng(0), statistic(np.arange(len(patients)))
    halves = [np.isin(member, rng.permutation(len(names))[: len(names) // 2]) for _ in range(draws)]
    away = [statistic(np.flatnonzero(half)) - whole for half in halves if half.sum() >= FEWEST]
    # Half of the patients differ from all of them by as much as all of them do from the population.
    reach = norm.ppf(0.975) * np.sqrt(np.nanmean(np.square(away))) if away else np.nan
    return whole - reach, whole + reach
