"""The KS lab: a threshold on two cumulative distributions, and everything that moves the gap without any learning."""

from typing import NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from mocolayers.evaluation.distributions import flatten, ks_distance
from mocolayers.evaluation.scores import macro_auc
from mocolayers.labs.panel import Answer, Lab, choice, power_slider, quick_figure, slider, tick, whole_slider


class Gap(NamedTuple):
    """What the lab shows.

    Attributes:
        first, second: sorted probabilities of the class by both models.
        at: shares of images at or below the threshold, by both.
        distance: the largest gap over all thresholds.
        where: a threshold at which it occurs.
        auc: macro AUC of both models on these rows.
    """

    first: np.ndarray
    second: np.ndarray
    at: tuple[float, float]
    distance: float
    where: float
    auc: tuple[float, float]


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
) -> Gap:
    """Compare two models' probabilities of one class on the same test rows.

    Args:
        first, second: (n, L) probabilities; the first is flattened by `temperature`.
        truth: (n, L) booleans.
        task, column: see `columns_of`.
        threshold: where the two shares are read off.
        shuffle: hand the first model's outputs to the wrong images.
        rows: use a random draw of so many test rows.
    """
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(first))[: rows or len(first)]
    if temperature != 1:  # rounding would break ties that are none
        first = flatten(first, task, temperature)
    first, second, truth = first[chosen], second[chosen], truth[chosen]
    if shuffle:
        first = first[rng.permutation(len(first))]
    p, q = first[:, column], second[:, column]
    auc = tuple(float(macro_auc(truth, z)[0]) for z in (first, second))
    at = float(np.mean(p <= threshold)), float(np.mean(q <= threshold))
    where = float(ks_2samp(p, q, method="asymp").statistic_location)
    return Gap(np.sort(p), np.sort(q), at, float(ks_distance(p, q)[0]), where, auc)


def draw_gap(gap: Gap, threshold: float, names: tuple[str, str], column: str):
    """Both cumulative distributions, the gap at the threshold and the largest one."""
    figure, axes = quick_figure(2, (9, 3.6), width_ratios=(1.5, 1))
    share = np.arange(1, len(gap.first) + 1) / len(gap.first)
    for values, name, colour in ((gap.first, names[0], "#D55E00"), (gap.second, names[1], "#0072B2")):
        axes[0].step(
            np.concatenate([[0], values, [1]]),
            np.concatenate([[0], share, [1]]),
            where="post",
            color=colour,
            label=name,
        )
        axes[1].hist(values, np.linspace(0, 1, 26), histtype="step", color=colour, linewidth=1.5)
    ends = [np.searchsorted(z, gap.where, side="right") / len(z) for z in (gap.first, gap.second)]
    axes[0].plot([gap.where] * 2, ends, color="black", linewidth=4, solid_capstyle="butt", label="largest gap, D")
    axes[0].axvline(threshold, color="#999999", linestyle="--", label="threshold")
    axes[0].plot([threshold] * 2, gap.at, "o", color="black", ms=5)
    axes[0].set(
        xlim=(0, 1), ylim=(0, 1.02), xlabel=f"predicted probability of {column}", ylabel="share of images at or below"
    )
    axes[0].legend(fontsize=8)
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
        here = f"{gap.at[0]:.1%} against {gap.at[1]:.1%}: a gap of {abs(gap.at[0] - gap.at[1]):.3f}"
        numbers = {
            f"at or below {threshold:.2f}": here,
            "D, the largest gap": f"{gap.distance:.3f} at {gap.where:.2f}",
            "AUC of both models": f"{gap.auc[0]:.3f} and {gap.auc[1]:.3f}",
        }
        alt = f"Two cumulative distributions of the probability of {column} with a threshold and the largest gap."
        return Answer(draw_gap(gap, threshold, ("fewer labels", "all labels"), column), alt, numbers)

    controls = {
        "pair": choice("models", list(outputs)),
        "column": choice("class", list(classes)),
        "threshold": slider("threshold", 0.5, 0, 1, 0.02),
        "temperature": power_slider("flatten the first", 1.0, -1, 1, 0.1),
        "shuffle": tick("hand its outputs to wrong images"),
        "rows": whole_slider("test images", most, min(20, most), most),
    }
    return Lab(controls, answer, "Which threshold shows the largest gap?")
