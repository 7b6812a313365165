"""The KS lab: a threshold on two cumulative distributions, and everything that moves the gap without any learning."""

import numpy as np
from ipywidgets import Checkbox, Dropdown, FloatLogSlider, FloatSlider, IntSlider
from matplotlib.figure import Figure
from scipy.stats import ks_2samp

from mocolayers.evaluation.distributions import flatten
from mocolayers.evaluation.scores import macro_auc
from mocolayers.labs.panel import Answer, Lab, quick_figure

LOOKS = ({"color": "#D55E00", "linestyle": "-"}, {"color": "#0072B2", "linestyle": "--"})


def compute(
    first: np.ndarray,
    second: np.ndarray,
    truth: np.ndarray,
    task: str,
    column: int,
    threshold: float,
    temperature: float = 1.0,
    shuffle: bool = False,
    rows: int | None = None,
) -> dict:
    """Compare two models' probabilities of one class on the same test rows.

    Args:
        first, second: (n, L) probabilities; those of the first are flattened by `temperature`.
        truth: (n, L) booleans.
        task, column: see `columns_of`.
        threshold: where the shares of images are read off.
        shuffle: hand the first model's outputs to the wrong images.
        rows: how many random test rows.
    Returns:
        `first` and `second`: the probabilities of the class; `at`: the share of images at or below the threshold, by
        both; `distance` and `where`: the largest gap and its threshold; `auc`: macro AUC of both.
    """
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(first))[: rows or len(first)]
    if temperature != 1:  # rounding would break ties that are none
        first = flatten(first, task, temperature)
    first, second, truth = first[chosen], second[chosen], truth[chosen]
    if shuffle:
        first = first[rng.permutation(len(first))]
    p, q = first[:, column], second[:, column]
    gap = ks_2samp(p, q, method="asymp")
    return {
        "first": p,
        "second": q,
        "at": [float(np.mean(z <= threshold)) for z in (p, q)],
        "distance": float(gap.statistic),
        "where": float(gap.statistic_location),
        "auc": [float(macro_auc(truth, z)[0]) for z in (first, second)],
    }


def cdf_gap(axis, first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> None:
    """Draw the cumulative distributions of two models' probabilities (n,), and mark the largest gap between them."""
    for values, name, look in zip((first, second), names, LOOKS, strict=True):
        axis.ecdf(values, **look, label=name)
    gap = ks_2samp(first, second, method="asymp")
    where = gap.statistic_location
    low, high = sorted(np.mean(values <= where) for values in (first, second))
    axis.vlines(where, low, high, color="black", linewidth=3, zorder=4)  # over the text's box
    side = "right" if where > 0.5 else "left"
    text, box = f"  D = {gap.statistic:.3f}  ", {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axis.text(where, (low + high) / 2, text, ha=side, va="center", fontweight="bold", bbox=box)
    axis.set(xlim=(0, 1), ylim=(0, 1.02))


def draw_gap(gap: dict, threshold: float, names: tuple[str, str], column: str) -> Figure:
    """Both cumulative distributions, the gap at the threshold and the largest one."""
    figure, axes = quick_figure(2, (9, 3.6), width_ratios=(1.5, 1))
    cdf_gap(axes[0], gap["first"], gap["second"], names)
    axes[0].axvline(threshold, color="#999999", linestyle=":", label="threshold")
    axes[0].plot([threshold] * 2, gap["at"], "o", color="black", ms=5)
    axes[0].set(xlabel=f"predicted probability of {column}", ylabel="share of images at or below")
    axes[0].legend(fontsize=8)
    for values, look in zip((gap["first"], gap["second"]), LOOKS, strict=True):
        axes[1].hist(values, np.linspace(0, 1, 26), histtype="step", **look, linewidth=1.5)
    axes[1].set(xlim=(0, 1), xlabel="predicted probability", ylabel="images", title="the same as histograms")
    return figure


def distribution_lab(
    outputs: dict[str, tuple[np.ndarray, np.ndarray]], truth: np.ndarray, task: str, classes: dict[str, int]
) -> Lab:
    """A slider for the threshold, and controls for what moves D.

    Args:
        outputs: name of a pair and its two models' (n, L) probabilities, few labels first.
        truth: (n, L) booleans.
        task: see `columns_of`.
        classes: name and column of each class to choose from.
    """
    most = len(truth)

    def answer(pair, column, threshold, temperature, shuffle, rows) -> Answer:
        gap = compute(*outputs[pair], truth, task, classes[column], threshold, temperature, shuffle, rows)
        few, every = gap["at"]
        numbers = {
            f"at or below {threshold:.2f}": f"{few:.2%} against {every:.2%}: a gap of {abs(few - every):.3f}",
            "D, the largest gap": f"{gap['distance']:.3f} at {gap['where']:.2f}",
            "AUC of both models": "{:.3f} and {:.3f}".format(*gap["auc"]),
        }
        if np.isnan(gap["auc"]).any():
            numbers["AUC of both models"] = "not defined: these test images are all of one kind"
        alt = f"Two cumulative distributions of the probability of {column} with a threshold and the largest gap."
        return draw_gap(gap, threshold, ("first model", "second model"), column), alt, numbers

    controls = {
        "pair": Dropdown(options=list(outputs), description="models"),
        "column": Dropdown(options=list(classes), description="class"),
        "threshold": FloatSlider(0.5, min=0, max=1, step=0.02, description="threshold"),
        "temperature": FloatLogSlider(1, min=-1, max=1, readout_format=".2g", description="flatten the first"),
        "shuffle": Checkbox(False, indent=False, description="hand its outputs to wrong images"),
        "rows": IntSlider(most, min=min(20, most), max=most, description="test images"),
    }
    frames = [{"temperature": temperature} for temperature in (0.3, 3, 10)] + [{"shuffle": True}]
    frames += [{"rows": n} for n in (25, 100) if n < most] + [{"threshold": threshold} for threshold in (0.1, 0.9)]
    idle = lambda **_: {"column"} if len(classes) == 1 else set()  # noqa: E731
    return Lab(controls, answer, "Which threshold shows the largest gap?", idle, frames)
