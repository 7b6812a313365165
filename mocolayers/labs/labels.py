"""The label lab: which patients are in the 1%, and how much the score owes to the choice of the labelled images."""

import numpy as np
from ipywidgets import IntSlider, SelectionSlider
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from tqdm import tqdm

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import columns_of, macro_auc, patient_bootstrap
from mocolayers.labs.panel import Answer, Lab, quick_figure
from mocolayers.recipe import Evaluation

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)

Draws = dict[tuple[float, int], dict]  # by fraction and seed, see `label_draws`


def label_draws(features: dict[str, np.ndarray], data: MedicalImages, plan: Evaluation, seeds: int = 6) -> Draws:
    """Linear evaluation for every fraction and seed of the lab; with all labels there is one subset for all seeds.

    Args:
        features: (n, D) of "train", "val" and "test" each.
        data, plan: see `linear_evaluation`.
        seeds: label subsets of each fraction, two or more.
    Returns:
        By fraction and seed: `rows`, the labelled ones; `probabilities` (m, L) on test; and their macro `auc` with its
        95% interval `low`, `high` over test patients.
    """
    test, found = data.rows("test"), {}
    truth, pairs = class_matrix(data, test), [(f, s) for f in FRACTIONS for s in range(seeds if f < 1 else 1)]
    for fraction, seed in tqdm(pairs, desc="label subsets"):
        rows = label_subset(data, fraction, seed)
        probabilities, _ = linear_evaluation(features, data, rows, plan)
        auc = macro_auc(truth, probabilities)[0]
        low, high = patient_bootstrap(truth, probabilities, data.patients[test], plan.resamples)
        found[fraction, seed] = {"rows": rows, "probabilities": probabilities, "auc": auc, "low": low, "high": high}
    return found | {(1.0, seed): found[1.0, 0] for seed in range(seeds)}


def compute(draws: Draws, data: MedicalImages, fraction: float, seed: int) -> dict:
    """What the lab shows of one label subset.

    Returns:
        The subset's entry in `draws`, with `spread`: AUC of every subset of this fraction; and `roc`: false and true
        positive rates of each class that has both kinds, by its name.
    """
    truth, probabilities = class_matrix(data, data.rows("test")), draws[fraction, seed]["probabilities"]
    classes = [c for c in columns_of(data.task, truth.shape[1]) if 0 < truth[:, c].mean() < 1]
    roc = {data.classes[c]: roc_curve(truth[:, c], probabilities[:, c])[:2] for c in classes}
    spread = [draw["auc"] for (f, _), draw in draws.items() if f == fraction]
    return draws[fraction, seed] | {"spread": spread, "roc": roc}


def draw_labels(shown: dict, draws: Draws, data: MedicalImages, fraction: float) -> Figure:
    """The labelled patients, the ROC, and this subset's AUC among the others'."""
    figure, axes = quick_figure(3, (9.6, 3.4), width_ratios=(1.3, 1, 1))
    train = data.rows("train")
    train = train[np.argsort(data.patients[train], kind="stable")]
    axes[0].vlines(np.flatnonzero(np.isin(train, shown["rows"])), 0, 1, color="#0072B2", linewidth=0.6)
    axes[0].set(title="labelled images", xlabel="training images by patient", xlim=(0, len(train)), yticks=[])
    for false, true in shown["roc"].values():
        axes[1].plot(false, true, color="#0072B2", linewidth=1.2, alpha=1 if len(shown["roc"]) == 1 else 0.5)
    axes[1].plot([0, 1], [0, 1], color="#999999", linestyle=":")
    axes[1].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC on test")
    for (part, _), draw in draws.items():
        axes[2].plot(FRACTIONS.index(part), draw["auc"], "o", ms=4, color="#56B4E9", alpha=0.8)
    whiskers = [[shown["auc"] - shown["low"]], [shown["high"] - shown["auc"]]]
    axes[2].errorbar(FRACTIONS.index(fraction), shown["auc"], whiskers, fmt="D", ms=7, capsize=4, color="#D55E00")
    axes[2].set_xticks(range(len(FRACTIONS)), [f"{f:.0%}" for f in FRACTIONS])
    axes[2].margins(x=0.1)
    ends = min(draw["low"] for draw in draws.values()), max(draw["high"] for draw in draws.values())
    axes[2].set(xlabel="labels", title="test AUC of every subset", ylim=ends)
    return figure


def label_lab(draws: Draws, data: MedicalImages) -> Lab:
    """Sliders for the label fraction and the seed of the subset."""

    def answer(fraction: float, seed: int) -> Answer:
        shown = compute(draws, data, fraction, seed)
        # A 95% interval is 2 x 1.96 standard deviations wide.
        over_subsets, over_patients = np.std(shown["spread"], ddof=1), (shown["high"] - shown["low"]) / 3.92
        numbers = {
            "labelled": f"{len(shown['rows']):,} images of {len(np.unique(data.patients[shown['rows']])):,} patients",
            "test AUC, 95% interval over test patients": "{auc:.3f}   ({low:.3f} to {high:.3f})".format(**shown),
            "its standard deviation over subsets, over patients": f"{over_subsets:.3f}, {over_patients:.3f}",
        }
        alt = f"Which training images are labelled at {fraction:.0%}, the ROC, and the AUC of every subset."
        return draw_labels(shown, draws, data, fraction), alt, numbers

    options, most = [(f"{f:.0%}", f) for f in FRACTIONS], max(seed for _, seed in draws)
    controls = {
        "fraction": SelectionSlider(options=options, value=FRACTIONS[0], description="labels"),
        "seed": IntSlider(0, min=0, max=most, description="seed of the subset"),
    }
    frames = [{"fraction": fraction, "seed": seed} for fraction in FRACTIONS[:3] for seed in (0, 1, most)]
    frames = [*frames[1:], {"fraction": 1.0}]  # the lab starts with the first
    idle = lambda fraction, **_: {"seed"} if fraction == 1 else set()  # noqa: E731
    return Lab(controls, answer, "How much of the score is the luck of the subset?", idle, frames)
