"""The CKA lab: bandwidth, number of rows and the null, on one pair of feature sets."""

import numpy as np
from ipywidgets import Checkbox, Dropdown, FloatLogSlider, IntSlider
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist, squareform

from mocolayers.evaluation.similarity import cka, median_distance
from mocolayers.labs.panel import Answer, Lab, quick_figure

SHOWN = 60  # rows of the kernel that are drawn
MOST = 400


def compute(x: np.ndarray, y: np.ndarray, sigma: float, rows: int) -> dict:
    """RBF-CKA of the first `rows` rows at an absolute bandwidth, beside its null.

    Args:
        x, y: (n, d) and (n, d') features of the same rows.
        sigma: bandwidth in the features' own units.
        rows: how many rows.
    Returns:
        `usual` and `debiased`: RBF-CKA and its null, each; `linear`: debiased linear CKA; `kernels`: corners of both
        kernel matrices; `distances`: between pairs of rows of x.
    """
    x, y = x[:rows], y[:rows]
    shuffled = y[np.random.default_rng(0).permutation(len(y))]
    usual, debiased = ([cka(x, z, "rbf", sigma=sigma, debiased=d) for z in (y, shuffled)] for d in (False, True))
    kernels = [np.exp(-(squareform(pdist(z[:SHOWN])) ** 2) / (2 * sigma**2)) for z in (x, y)]
    found = {"usual": usual, "debiased": debiased, "linear": cka(x, y)}
    return found | {"kernels": kernels, "distances": pdist(x[:200])}


def draw_alike(found: dict, sigma: float) -> Figure:
    """Both kernel matrices, the distances with the bandwidth among them, and CKA beside its null."""
    figure, axes = quick_figure(4, (10.4, 3.1), width_ratios=(1, 1, 1.1, 1.1))
    for axis, kernel, name in zip(axes, found["kernels"], ("first", "second"), strict=False):
        axis.imshow(kernel, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=f"kernel of the {name}", xlabel="image", xticks=[], yticks=[])
    axes[2].hist(found["distances"], 40, color="#56B4E9")
    axes[2].axvline(sigma, color="#D55E00", linewidth=2)
    axes[2].set(title="distances; line: sigma", xlabel="distance of two images", yticks=[])
    values, nulls = zip(found["usual"], found["debiased"], strict=True)
    axes[3].bar([-0.2, 0.8], values, 0.4, color="#0072B2", label="paired")
    axes[3].bar([0.2, 1.2], nulls, 0.4, color="#999999", hatch="//", label="permuted")
    axes[3].set_xticks([0, 1], ["usual", "debiased"])
    axes[3].set(xlim=(-0.7, 1.7), ylim=(-0.1, 1.45), yticks=(0, 0.5, 1), title="CKA")
    axes[3].legend(fontsize=8)
    return figure


def told(value: float, null: float) -> str:
    """A CKA beside its null, in words."""
    if not np.isfinite([value, null]).all():
        return "not defined: at this sigma all pairs of images have the same similarity"
    return f"{value:.3f}   rows permuted: {null:+.3f}"


def similarity_lab(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Lab:
    """Sliders for the bandwidth and the number of rows.

    Args:
        pairs: name and two (n, d) feature sets of the same rows, to choose from; the first is the default.
    """
    most = min(MOST, *(len(x) for x, _ in pairs.values()))

    def answer(pair: str, sigma: float, relative: bool, rows: int) -> Answer:
        x, y = pairs[pair]
        median = median_distance(x[:rows])
        sigma *= median if relative else 1
        found = compute(x, y, sigma, rows)
        numbers = {
            "sigma in the features' units": f"{sigma:.3g}   (median distance {median:.3g})",
            "CKA, usual estimate": told(*found["usual"]),
            "CKA, debiased": told(*found["debiased"]),
            "linear CKA, debiased (no sigma)": f"{found['linear']:.3f}",
        }
        alt = f"Two kernel matrices, a histogram of distances with sigma, and CKA beside its null for {rows} rows."
        return draw_alike(found, sigma), alt, numbers

    controls = {
        "pair": Dropdown(options=list(pairs), description="features"),
        "sigma": FloatLogSlider(0.8, min=-2, max=2, readout_format=".2g", description="sigma"),
        "relative": Checkbox(False, indent=False, description="sigma in median distances"),
        "rows": IntSlider(min(200, most), min=20, max=most, step=20, description="rows n"),
    }
    frames = [{"sigma": sigma, "relative": True} for sigma in (0.5, 1, 5)]
    frames += [{"rows": 20}, *({"pair": name} for name in list(pairs)[1:])]
    return Lab(controls, answer, "Can this CKA tell reuse from nothing?", frames=frames)
