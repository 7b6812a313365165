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
RESAMPLES = 200

Draws = dict[tuple[float, int], dict]  # by fraction and seed, see `label_draws`


def label_draws(features: dict[str, np.ndarray], data: MedicalImages, plan: Evaluation, seeds: int = 6) -> Draws:
    """Linear evaluation for every fraction and seed of the lab; with all labels there is one subset for all seeds.

    Args:
        features: (n, D) of "train", "val" and "test" each.
        data, plan: see `linear_evaluation`.
        seeds: label subsets of each fraction.
    Returns:
        By fraction and seed: `rows`, the labelled ones; `probabilities` (m, L) and macro `auc` on test.
    """
    truth, found = class_matrix(data, data.rows("test")), {}
    for fraction, seed in tqdm([(f, s) for f in FRACTIONS for s in range(seeds)], desc="label subsets"):
        if fraction == 1 and seed:
            found[fraction, seed] = found[fraction, 0]
            continue
        rows = label_subset(data, fraction, seed)
        probabilities, _ = linear_evaluation(features, data, rows, plan)
        auc = macro_auc(truth, probabilities)[0]
        found[fraction, seed] = {"rows": rows, "probabilities": probabilities, "auc": auc}
    return found


def compute(draws: Draws, data: MedicalImages, fraction: float, seed: int) -> dict:
    """What the lab shows of one label subset.

    Returns:
        `auc`, `low`, `high`: test AUC and its 95% interval over test patients; `spread`: AUC of every subset of this
        fraction; `roc`: false and true positive rates of each class that has both kinds, by its name.
    """
    test = data.rows("test")
    truth, probabilities = class_matrix(data, test), draws[fraction, seed]["probabilities"]
    low, high = patient_bootstrap(truth, probabilities, data.patients[test], RESAMPLES)
    classes = [c for c in columns_of(data.task, truth.shape[1]) if 0 < truth[:, c].mean() < 1]
    roc = {data.classes[c]: roc_curve(truth[:, c], probabilities[:, c])[:2] for c in classes}
    spread = [draw["auc"] for (f, _), draw in draws.items() if f == fraction]
    return {"auc": draws[fraction, seed]["auc"], "low": low, "high": high, "spread": spread, "roc": roc}


def draw_labels(shown: dict, draws: Draws, data: MedicalImages, fraction: float, seed: int) -> Figure:
    """The labelled patients, the ROC, and this subset's AUC among the others'."""
    figure, axes = quick_figure(3, (9.6, 3.4), width_ratios=(1.3, 1, 1))
    train = data.rows("train")
    train = train[np.argsort(data.patients[train], kind="stable")]
    inside = np.isin(train, draws[fraction, seed]["rows"])
    axes[0].vlines(np.flatnonzero(inside), 0, 1, color="#0072B2", linewidth=0.6)
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
    axes[2].margins(0.1)
    axes[2].set(xlabel="labels", title="test AUC of every subset")
    return figure


def label_lab(draws: Draws, data: MedicalImages) -> Lab:
    """Sliders for the label fraction and the seed of the subset."""

    def answer(fraction: float, seed: int) -> Answer:
        shown, rows = compute(draws, data, fraction, seed), draws[fraction, seed]["rows"]
        spread = max(shown["spread"]) - min(shown["spread"])
        numbers = {
            "labelled": f"{len(rows):,} images of {len(np.unique(data.patients[rows])):,} patients",
            "test AUC, 95% interval over test patients": "{auc:.3f}   ({low:.3f} to {high:.3f})".format(**shown),
            f"best minus worst of {len(shown['spread'])} subsets": f"{spread:.3f}",
        }
        alt = f"Which training images are labelled at {fraction:.0%}, the ROC, and the AUC of every subset."
        return draw_labels(shown, draws, data, fraction, seed), alt, numbers

    options, most = [(f"{f:.0%}", f) for f in FRACTIONS], max(seed for _, seed in draws)
    controls = {
        "fraction": SelectionSlider(options=options, value=FRACTIONS[0], description="labels"),
        "seed": IntSlider(0, min=0, max=most, description="seed of the subset"),
    }
    frames = {f"{f:.0%}, seed {seed}": {"fraction": f, "seed": seed} for f in FRACTIONS[:3:2] for seed in (0, 1, most)}
    frames["100%"] = {"fraction": 1.0}
    idle = lambda fraction, **_: {"seed"} if fraction == 1 else set()  # noqa: E731
    return Lab(controls, answer, "How much of the score is the luck of the subset?", idle, frames)
