"""The label lab: which patients are in the 1%, and how much the score owes to the draw."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_curve
from tqdm import tqdm

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.distributions import columns_of
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc, patient_bootstrap
from mocolayers.labs.panel import Answer, Lab, quick_figure, steps_slider, whole_slider
from mocolayers.recipe import Evaluation

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
RESAMPLES = 200
STRIP = 1500  # training images drawn in the strip at most


class Draw(NamedTuple):
    """One label subset and what a logistic regression made of it.

    Attributes:
        rows: (n,) the labelled rows.
        probabilities: (m, L) on the test rows.
        auc: macro AUC on test.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    auc: float


def label_draws(
    features: dict[str, np.ndarray], data: MedicalImages, plan: Evaluation, seeds: int = 6
) -> dict[tuple[float, int], Draw]:
    """Linear evaluation for every fraction and seed of the lab; with all labels there is one draw for all seeds.

    Args:
        features: of the splits, see `encode_splits`.
    """
    truth, found = class_matrix(data, data.rows("test")), {}
    jobs = [(f, s) for f in FRACTIONS for s in range(seeds)]
    for fraction, seed in tqdm(jobs, desc="label subsets"):
        if fraction == 1 and seed:
            found[fraction, seed] = found[fraction, 0]
            continue
        rows = label_subset(data, fraction, seed)
        probabilities, _ = linear_evaluation(features, data, rows, plan)
        found[fraction, seed] = Draw(rows, probabilities, macro_auc(truth, probabilities)[0])
    return found


class Shown(NamedTuple):
    """What the lab shows of one draw.

    Attributes:
        auc, low, high: test AUC and its 95% interval over test patients.
        spread: (seeds,) AUC of every draw of this fraction.
        roc: name, false positive rates and true positive rates of each class with both kinds.
    """

    auc: float
    low: float
    high: float
    spread: np.ndarray
    roc: list[tuple[str, np.ndarray, np.ndarray]]


def compute(draws: dict[tuple[float, int], Draw], data: MedicalImages, fraction: float, seed: int) -> Shown:
    """The interval, the ROC curves and the other draws of one fraction."""
    test = data.rows("test")
    truth, draw = class_matrix(data, test), draws[fraction, seed]
    low, high = patient_bootstrap(truth, draw.probabilities, data.patients[test], RESAMPLES)
    classes = [c for c in columns_of(data.task, truth.shape[1]) if 0 < truth[:, c].mean() < 1]
    roc = [(data.classes[c], *roc_curve(truth[:, c], draw.probabilities[:, c])[:2]) for c in classes]
    spread = np.array([d.auc for (f, _), d in draws.items() if f == fraction])
    return Shown(draw.auc, low, high, spread, roc)


def draw_labels(shown: Shown, draws, data: MedicalImages, fraction: float, seed: int):
    """The strip of patients, the ROC, and where this draw lies among the others."""
    figure, axes = quick_figure(3, (9.6, 3.4), width_ratios=(1.3, 1, 1))
    train = data.rows("train")
    train = train[np.argsort(data.patients[train], kind="stable")]
    inside = np.isin(train, draws[fraction, seed].rows)
    side = int(np.ceil(np.sqrt(min(len(train), STRIP))))
    tiles = np.full(side * side, np.nan)
    step = max(1, -(-len(train) // (side * side)))
    blocks = [inside[start : start + step].any() for start in range(0, len(train), step)][: side * side]
    tiles[: len(blocks)] = blocks
    axes[0].imshow(tiles.reshape(side, side), cmap="Blues", vmin=-0.15, vmax=1, interpolation="nearest")
    axes[0].set(title="labelled images (dark)", xlabel="patients side by side, line by line", xticks=[], yticks=[])
    for _, false, true in shown.roc:
        axes[1].plot(false, true, color="#0072B2", linewidth=1.2, alpha=1 if len(shown.roc) == 1 else 0.5)
    axes[1].plot([0, 1], [0, 1], color="#999999", linestyle=":")
    axes[1].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC on test")
    for number, part in enumerate(FRACTIONS):
        others = [d.auc for (f, _), d in draws.items() if f == part]
        axes[2].plot([number] * len(others), others, "o", ms=4, color="#56B4E9", alpha=0.8)
    whiskers = [[shown.auc - shown.low], [shown.high - shown.auc]]
    axes[2].errorbar([FRACTIONS.index(fraction)], [shown.auc], whiskers, fmt="o", ms=7, capsize=4, color="#D55E00")
    axes[2].set_xticks(range(len(FRACTIONS)), [f"{f:.0%}" for f in FRACTIONS])
    axes[2].set(xlabel="labels", title="test AUC of every draw")
    return figure


def label_lab(draws: dict[tuple[float, int], Draw], data: MedicalImages) -> Lab:
    """Sliders for the label fraction and the seed of the draw."""
    seeds = 1 + max(seed for _, seed in draws)

    def answer(fraction: float, seed: int) -> Answer:
        shown, rows = compute(draws, data, fraction, seed), draws[fraction, seed].rows
        spread = shown.spread.max() - shown.spread.min()
        numbers = {
            "labelled": f"{len(rows):,} images of {len(np.unique(data.patients[rows])):,} patients",
            "test AUC, 95% interval over test patients": f"{shown.auc:.3f}   ({shown.low:.3f} to {shown.high:.3f})",
            f"best minus worst of {len(shown.spread)} draws": f"{spread:.3f}",
        }
        alt = f"Which training images are labelled at {fraction:.0%}, the ROC, and the AUC of every draw."
        return Answer(draw_labels(shown, draws, data, fraction, seed), alt, numbers)

    controls = {
        "fraction": steps_slider("labels", 0.01, [(f"{f:.0%}", f) for f in FRACTIONS]),
        "seed": whole_slider("seed of the draw", 0, 0, seeds - 1),
    }
    return Lab(controls, answer, "How much of the score is the luck of the draw?")
