"""The CKA lab: bandwidth, number of rows and the null, on one pair of feature sets."""

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import pdist, squareform

from mocolayers.evaluation.similarity import cka, median_distance
from mocolayers.labs.panel import Answer, Lab, choice, power_slider, quick_figure, tick, whole_slider

SHOWN = 60  # rows of the kernel that are drawn
MOST = 400


class Alike(NamedTuple):
    """What the lab shows.

    Attributes:
        usual, debiased: RBF-CKA of the pair at this bandwidth.
        usual_null, debiased_null: the same with the rows of the second set permuted.
        linear: debiased linear CKA, which has no bandwidth.
        kernels: two (60, 60) corners of the kernel matrices.
        distances: between pairs of rows of the first set.
    """

    usual: float
    debiased: float
    usual_null: float
    debiased_null: float
    linear: float
    kernels: tuple[np.ndarray, np.ndarray]
    distances: np.ndarray


def compute(x: np.ndarray, y: np.ndarray, sigma: float, rows: int, seed: int = 0) -> Alike:
    """RBF-CKA of the first `rows` rows at an absolute bandwidth, beside its null.

    Args:
        x, y: (n, d) and (n, d') features of the same rows.
        sigma: bandwidth in the features' own units.
    """
    x, y = x[:rows], y[:rows]
    shuffled = y[np.random.default_rng(seed).permutation(len(y))]
    values = {d: cka(x, y, "rbf", sigma=sigma, debiased=d) for d in (False, True)}
    nulls = {d: cka(x, shuffled, "rbf", sigma=sigma, debiased=d) for d in (False, True)}
    kernels = tuple(np.exp(-(squareform(pdist(z[:SHOWN])) ** 2) / (2 * sigma**2)) for z in (x, y))
    return Alike(values[False], values[True], nulls[False], nulls[True], cka(x, y), kernels, pdist(x[:200]))


def draw_alike(found: Alike, sigma: float):
    """Both kernel matrices, the distances with the bandwidth among them, and CKA beside its null."""
    figure, axes = quick_figure(4, (10.4, 3.1), width_ratios=(1, 1, 1.1, 1.1))
    for axis, kernel, name in zip(axes, found.kernels, ("first", "second"), strict=False):
        axis.imshow(kernel, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=f"kernel of the {name}", xlabel="image", xticks=[], yticks=[])
    axes[2].hist(found.distances, 40, color="#56B4E9")
    axes[2].axvline(sigma, color="#D55E00", linewidth=2)
    axes[2].set(title="distances; line: sigma", xlabel="distance of two images", yticks=[])
    pairs = {"usual": (found.usual, found.usual_null), "debiased": (found.debiased, found.debiased_null)}
    for place, (value, null) in enumerate(pairs.values()):
        axes[3].bar(place - 0.2, value, 0.4, color="#0072B2", label="paired" if not place else None)
        axes[3].bar(place + 0.2, null, 0.4, color="#999999", hatch="//", label="permuted" if not place else None)
    axes[3].set_xticks([0, 1], list(pairs))
    axes[3].set(ylim=(-0.1, 1.05), title="CKA")
    axes[3].legend(fontsize=8)
    return figure


def similarity_lab(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Lab:
    """Sliders for the bandwidth and the number of rows.

    Args:
        pairs: name and two (n, d) feature sets of the same rows, to choose from; the first is the default.
    """
    most = min(MOST, *(len(x) for x, _ in pairs.values()))

    def answer(pair: str, sigma: float, relative: bool, rows: int) -> Answer:
        x, y = pairs[pair]
        median = median_distance(x[:rows])
        unit = median if relative else 1.0
        found = compute(x, y, sigma * unit, rows)
        numbers = {
            "sigma in the features' units": f"{sigma * unit:.3g}   (median distance {median:.3g})",
            "CKA, usual estimate": f"{found.usual:.3f}   rows permuted: {found.usual_null:.3f}",
            "CKA, debiased": f"{found.debiased:.3f}   rows permuted: {found.debiased_null:+.3f}",
            "linear CKA, debiased (no sigma)": f"{found.linear:.3f}",
        }
        alt = f"Two kernel matrices, a histogram of distances with sigma, and CKA beside its null for {rows} rows."
        return Answer(draw_alike(found, sigma * unit), alt, numbers)

    controls = {
        "pair": choice("features", list(pairs)),
        "sigma": power_slider("sigma", 0.8, -2, 2, 0.1),
        "relative": tick("sigma in median distances"),
        "rows": whole_slider("rows n", min(200, most), 20, most, 20),
    }
    return Lab(controls, answer, "Can this CKA tell reuse from nothing?")
