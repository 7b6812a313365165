"""Centred kernel alignment (CKA): how alike two sets of features of the same rows are, with its null and its error.

Source: Kornblith et al. 2019 (1905.00414); the debiased form uses the unbiased HSIC of Song et al. 2012 (JMLR 13).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist
from scipy.stats import norm
from torch import nn

from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.distributions import _about
from mocolayers.evaluation.features import STAGES, kept_stage_features, stage_features
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.recipe import Evaluation
from mocolayers.training.runs import Run


def feature_reuse(
    run: Run, data: MedicalImages, plan: Evaluation, fraction: float, device: str = "auto"
) -> pd.DataFrame:
    """How alike the test features are before and after fine-tuning, per stage, with what it has to be read against.

    Args:
        run: a finished pretraining; from the arm "supervised" it is the untrained encoder.
        data: whose test rows are used; the same rows, in the same order, in every column.
        plan, device: of the fine-tuning; intervals and the released setting take a tenth of the plan's resamples.
        fraction: share of labels it may use.
    Returns:
        One row per stage: `linear` is the debiased linear CKA with its 95% interval `low`, `high` over test patients;
        `biased`, `rbf` (debiased, bandwidth the median distance) and `released` (with `released_std`) are other
        settings; `null` and `released_null` are CKA with permuted rows; `twin` is the CKA of two fine-tunings of
        this encoder that differ in their draw; `moved` is how far the stage's weights went, relative to their norm.
    """
    rows, patients, draws = data.rows("test"), data.patients[data.rows("test")], plan.resamples // 10
    before = run.load_encoder()
    after, twin = (fine_tuned(run, data, fraction, draw, plan, device)[0].encoder for draw in (0, 1))
    kept = [stage["test"] for stage in kept_stage_features(run, data)]
    features = [kept, *(stage_features(encoder, data, rows) for encoder in (after, twin))]
    found = []
    for stage, moved, x, y, z in zip(STAGES, weights_moved(before, after), *features, strict=True):
        row = {"stage": stage} | _measures(x, y, draws)
        row["low"], row["high"] = patient_interval(lambda half, x=x, y=y: cka(x[half], y[half]), patients, draws)
        found.append(row | {"twin": cka(y, z), "moved": moved})
    return _about(run, pd.DataFrame(found), fraction)


def _measures(x: np.ndarray, y: np.ndarray, draws: int) -> dict[str, float]:
    released, released_std = released_cka(x, y, draws)
    permuted = np.random.default_rng(0).permutation(len(y))
    return {
        "linear": cka(x, y),
        "biased": cka(x, y, debiased=False),
        "rbf": cka(x, y, "rbf"),
        "released": released,
        "released_std": released_std,
        "null": float(cka_null(x, y).mean()),
        "biased_null": float(cka_null(x, y, debiased=False).mean()),
        "released_null": released_cka(x, y[permuted], 1)[0],
    }


def weights_moved(before: nn.Module, after: nn.Module) -> list[float]:
    """Per stage the distance between two encoders' weights, divided by the norm of the first one's."""
    found = []
    for stage in STAGES:
        first, second = (
            torch.cat([p.detach().cpu().flatten() for p in getattr(encoder, f"layer{stage}").parameters()])
            for encoder in (before, after)
        )
        found.append(float((second - first).norm() / first.norm()))
    return found


def similarity_matrix(features: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """(len(features), len(others)) debiased linear CKA of every pair, e.g. of all stages of two encoders."""
    return np.array([[cka(x, y) for y in others] for x in features])


BLOCK = 256  # rows of a kernel matrix that are in memory at a time


MEDIAN_ROWS = 1000


WHOLE = 4000  # rows up to which a whole kernel matrix may be in memory


def cka(
    x: np.ndarray,
    y: np.ndarray,
    kernel: str = "linear",
    relative: float = 1.0,
    sigma: float | None = None,
    debiased: bool = True,
) -> float:
    """CKA of two feature sets; 1 for equal geometry, about 0 for unrelated features when debiased.

    Memory grows with n * d, never with n * n: the linear kernel works in feature space, the RBF kernel block by block.

    Args:
        x, y: (n, d) and (n, d') features of the same rows in the same order.
        kernel: "linear", or "rbf" for exp(-distance^2 / (2 sigma^2)).
        relative: RBF bandwidth in units of each set's own median distance, which makes it blind to scale.
        sigma: RBF bandwidth in absolute units; overrides `relative`. The released code uses 0.8.
        debiased: the unbiased estimate of each HSIC; otherwise the usual one, which grows as d / n does.
    Returns:
        The CKA, or NaN where it says nothing: features that do not vary, or an RBF kernel so narrow that no row has
        a neighbour (debiased).
    Raises:
        ValueError: rows that do not pair up, too few rows, values that are not finite, an unknown kernel.
    """
    x, y = _checked(x, y)
    if kernel == "linear":
        moments = _linear_moments(x, y)
    elif kernel == "rbf":
        widths = [sigma or relative * median_distance(z) for z in (x, y)]
        if not all(widths):
            return float("nan")
        moments = _rbf_moments(x, y, *widths)
    else:
        raise ValueError(f"kernel {kernel!r}: choose 'linear' or 'rbf'")
    return _ratio(moments, _debiased_hsic if debiased else _biased_hsic)


class _Moments(NamedTuple):
    """What an HSIC needs of two kernel matrices K and L."""

    total: float  # sum_ij K_ij L_ij
    rows_k: np.ndarray  # (n,) row sums
    rows_l: np.ndarray
    diagonal_k: np.ndarray  # (n,)
    diagonal_l: np.ndarray

    @property
    def traces(self) -> float:
        """sum_i K_ii L_ii."""
        return float(self.diagonal_k @ self.diagonal_l)


def _ratio(moments: tuple[_Moments, _Moments, _Moments], estimate: Callable[[_Moments], float]) -> float:
    xy, xx, yy = (estimate(pair) for pair in moments)
    # Below this share of the diagonal a kernel is constant off its diagonal, up to rounding.
    for own, pair in ((xx, moments[1]), (yy, moments[2])):
        if own <= 1e-12 * pair.traces / len(pair.rows_k):
            return float("nan")
    return float(xy / np.sqrt(xx * yy))


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"features must be (n, d) with the same n rows in the same order, not {x.shape} and {y.shape}")
    if len(x) < 4:
        raise ValueError(f"CKA needs at least 4 rows, not {len(x)}")
    for name, z in (("first", x), ("second", y)):
        if not np.isfinite(z).all():
            raise ValueError(f"the {name} features hold {(~np.isfinite(z)).sum()} values that are NaN or infinite")
    return x - x.mean(axis=0), y - y.mean(axis=0)


def _linear_moments(x: np.ndarray, y: np.ndarray) -> tuple[_Moments, _Moments, _Moments]:
    def pair(a: np.ndarray, b: np.ndarray) -> _Moments:
        total = np.square(a.T @ b).sum()
        sums = [z @ z.sum(axis=0) for z in (a, b)]
        return _Moments(total, *sums, np.square(a).sum(axis=1), np.square(b).sum(axis=1))

    return pair(x, y), pair(x, x), pair(y, y)


def _rbf_moments(x: np.ndarray, y: np.ndarray, sigma_x: float, sigma_y: float) -> tuple[_Moments, _Moments, _Moments]:
    totals, sums = np.zeros(3), []
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        kx, ky = _rbf_rows(x, part, sigma_x), _rbf_rows(y, part, sigma_y)  # (BLOCK, n) each
        totals += np.vdot(kx, ky), np.vdot(kx, kx), np.vdot(ky, ky)
        sums.append((kx.sum(axis=1), ky.sum(axis=1)))
    k, m = (np.concatenate(rows) for rows in zip(*sums, strict=True))
    return _three_moments(totals, k, m)


def _three_moments(totals: Sequence[float], k: np.ndarray, m: np.ndarray) -> tuple[_Moments, _Moments, _Moments]:
    """For kernels with ones on their diagonals, from the sums of K * L, K * K and L * L, and the row sums."""
    ones = np.ones(len(k))
    pairs = zip(totals, ((k, m), (k, k), (m, m)), strict=True)
    return tuple(_Moments(total, *rows, ones, ones) for total, rows in pairs)


def _rbf_rows(x: np.ndarray, part: slice, sigma: float) -> np.ndarray:
    norms = np.square(x).sum(axis=1)
    squared = x[part] @ x.T
    squared *= -2
    squared += norms[part, None] + norms
    np.maximum(squared, 0, out=squared)
    # A row's distance to itself is zero; rounding says otherwise.
    squared[np.arange(len(squared)), np.arange(len(x))[part]] = 0
    squared /= -2 * sigma**2
    return np.exp(squared, out=squared)


def _biased_hsic(m: _Moments) -> float:
    n = len(m.rows_k)
    both = m.rows_k.sum() * m.rows_l.sum()
    return (m.total - 2 / n * (m.rows_k @ m.rows_l) + both / n**2) / (n - 1) ** 2


def _debiased_hsic(m: _Moments) -> float:
    n = len(m.rows_k)
    total, rows_k, rows_l = m.total - m.traces, m.rows_k - m.diagonal_k, m.rows_l - m.diagonal_l
    both = rows_k.sum() * rows_l.sum()
    return (total + both / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k @ rows_l)) / (n * (n - 3))


def median_distance(x: np.ndarray) -> float:
    """Median Euclidean distance between different rows, of at most 1,000 evenly spaced ones."""
    return float(np.median(pdist(x[:: -(-len(x) // MEDIAN_ROWS)])))


def cka_null(x: np.ndarray, y: np.ndarray, draws: int = 20, seed: int = 0, **options) -> np.ndarray:
    """(draws,) CKA after the rows of y were permuted: what features of these shapes score when nothing pairs up."""
    rng = np.random.default_rng(seed)
    return np.array([cka(x, y[rng.permutation(len(y))], **options) for _ in range(draws)])


def released_cka(x: np.ndarray, y: np.ndarray, draws: int = 50, rows: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and std of CKA as the released code measures it: RBF, sigma 0.8 absolute, 50 draws of 1,000 rows.

    With fewer rows than that every draw is the whole set, and the std is 0.
    """
    rng = np.random.default_rng(seed)
    if len(x) <= rows:
        return cka(x, y, "rbf", sigma=0.8, debiased=False), 0.0
    drawn = [rng.choice(len(x), rows, replace=False) for _ in range(draws)]
    if len(x) > WHOLE:
        values = [cka(x[part], y[part], "rbf", sigma=0.8, debiased=False) for part in drawn]
    else:
        values = _drawn_cka(*(_rbf_rows(z, slice(None), 0.8) for z in _checked(x, y)), drawn)
    return float(np.mean(values)), float(np.std(values))


def _drawn_cka(kx: np.ndarray, ky: np.ndarray, drawn: list[np.ndarray]) -> list[float]:
    """The usual CKA of each draw of rows, from two (n, n) kernel matrices and all draws at once."""
    chosen = np.zeros((len(kx), len(drawn)))
    for draw, part in enumerate(drawn):
        chosen[part, draw] = 1
    totals = [(chosen * ((a * b) @ chosen)).sum(axis=0) for a, b in ((kx, ky), (kx, kx), (ky, ky))]
    sums_k, sums_l = kx @ chosen, ky @ chosen  # (n, draws) row sums over the drawn columns
    found = []
    for draw, part in enumerate(drawn):
        moments = _three_moments([total[draw] for total in totals], sums_k[part, draw], sums_l[part, draw])
        found.append(_ratio(moments, _biased_hsic))
    return found


def patient_interval(
    statistic: Callable[[np.ndarray], float], patients: np.ndarray, draws: int = 50, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic of rows, from random halves of the patients (the delete-half jackknife).

    The bootstrap repeats rows, and repeated rows are alike whatever the features are, which would pull every CKA up.

    Args:
        statistic: takes row numbers, returns one number.
        patients: (n,) identifiers; a half holds all rows of a patient or none.
        draws: number of halves.
        seed: of the draws; the same seed gives the same halves, so that arms can be compared in pairs.
    """
    names, member = np.unique(patients, return_inverse=True)
    rng, whole = np.random.default_rng(seed), statistic(np.arange(len(patients)))
    away = []
    for _ in range(draws):
        half = np.zeros(len(names), bool)
        half[rng.permutation(len(names))[: len(names) // 2]] = True
        away.append(statistic(np.flatnonzero(half[member])) - whole)
    # Half of the patients differ from all of them by as much as all of them do from the population.
    reach = norm.ppf(0.975) * np.sqrt(np.nanmean(np.square(away)))
    return whole - reach, whole + reach
