"""How long the labs take to answer: every control to both of its ends, from where the lab starts."""

import statistics
import time

import ipywidgets as widgets
import numpy as np
import pandas as pd
from pretraining import made_up_images
from tqdm import tqdm

from mocolayers.data.labels import class_matrix
from mocolayers.evaluation.features import stage_features
from mocolayers.labs.distributions import distribution_lab
from mocolayers.labs.labels import label_draws, label_lab
from mocolayers.labs.losses import loss_lab, stages_of
from mocolayers.labs.panel import Lab, as_html
from mocolayers.labs.queue import key_history, queue_lab
from mocolayers.labs.similarity import similarity_lab
from mocolayers.labs.views import Finding, learn_finding, view_lab
from mocolayers.recipe import EVALUATIONS, preset
from mocolayers.training.runs import build_encoder

SIZES = (4700, 500, 600)  # about those of PneumoniaMNIST


def all_labs() -> dict[str, Lab]:
    """Every lab at the size of the lesson; what the pictures show does not matter for speed, so they are random."""
    data = made_up_images(28, 1, SIZES)
    recipe = preset("lesson", "moco", data)
    encoder = build_encoder(recipe).eval()
    features = {split: stage_features(encoder, data, data.rows(split))[3] for split in ("train", "val", "test")}
    draws = label_draws(features, data, EVALUATIONS["lesson"])
    stages = stages_of(encoder, data, recipe)
    rng = np.random.default_rng(0)
    test = data.rows("test")
    models = tuple(rng.dirichlet((1, 1), len(test)) for _ in range(2))
    features = tuple(rng.normal(size=(2, len(test), encoder.dim)))
    classes = dict.fromkeys(data.classes[1:], 1)
    return {
        "view": starting_at(view_lab(three_findings()), blur=4, rotation=30),
        "queue": queue_lab(key_history(recipe, data, steps=8)),
        "loss, MSE": loss_lab(stages),
        "loss, Barlow": starting_at(loss_lab(stages), loss="Barlow", width=256),
        "label": label_lab(draws, data),
        "CKA": starting_at(similarity_lab({"random": features}), rows=400, relative=True),
        "KS": distribution_lab({"random": models}, class_matrix(data, test), data.task, classes),
    }


def three_findings() -> dict[str, Finding]:
    """Three findings at the size of notebook 01: a bright square on noise."""
    found = {}
    for name, channels in (("chest", 1), ("histology", 3), ("retina", 3)):
        plain = made_up_images(96, channels).images[:22]
        ill = plain.copy()
        ill[:, 40:56, 40:56] = 255
        found[name] = learn_finding(list(zip(ill, plain, strict=True)))
    return found


def starting_at(lab: Lab, **values) -> Lab:
    """The lab with its most expensive settings on, so that every move is timed at its worst."""
    for name, value in values.items():
        lab.controls[name].value = value
    return lab


def ends(control: widgets.Widget) -> list:
    """The values between which a control can be moved; of a list, all."""
    if isinstance(control, widgets.Dropdown):
        return list(control.options)
    if isinstance(control, widgets.SelectionSlider):
        values = [value for _, value in control._options_full]
        return [values[0], values[-1]]
    if isinstance(control, widgets.Checkbox):
        return [False, True]
    if isinstance(control, widgets.FloatLogSlider):
        return [control.base**control.min, control.base**control.max]
    return [control.min, control.max]


def seconds(lab: Lab, repeats: int) -> dict[str, float]:
    """Median time of the answer after each move of one control, the rest where the lab starts."""
    found, start = {}, lab.values()
    for name, control in lab.controls.items():
        for value in ends(control):
            times = [timed(lab, start | {name: value}) for _ in range(repeats)]
            found[f"{name} = {value:.3g}" if isinstance(value, float) else f"{name} = {value}"] = statistics.median(
                times
            )
    return found


def timed(lab: Lab, setting: dict) -> float:
    """Seconds from a request to the HTML of its answer."""
    started = time.perf_counter()
    as_html(*lab.answer(**setting))
    return time.perf_counter() - started


def table(repeats: int = 3) -> pd.DataFrame:
    """One row per lab: how many moves were timed, the median and the slowest, and which that was."""
    rows = []
    for name, lab in tqdm(all_labs().items(), desc="labs"):
        times = seconds(lab, repeats)
        slowest = max(times, key=times.get)
        middle = f"{statistics.median(times.values()):.2f}"
        rows.append([name, len(times), middle, f"{times[slowest]:.2f}", slowest])
    return pd.DataFrame(rows, columns=["lab", "moves", "median, s", "slowest, s", "slowest move"])
