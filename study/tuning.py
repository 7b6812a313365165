"""Tuning with the same number of trials for every arm, on validation alone.

A trial is one pretraining with some fields of the recipe changed. What every arm has (learning rate, temperature,
crops) takes the same values in the same trial of every arm; the stage loss adds its weights and the stages it looks at.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from mocolayers.data.labels import label_subset, subset_seed
from mocolayers.data.prepared import TEST, MedicalImages, load
from mocolayers.evaluation.features import encode
from mocolayers.evaluation.probes import best_probe
from mocolayers.recipe import EVALUATIONS, Recipe, preset
from mocolayers.runtime import atomic_write
from mocolayers.training.pretrain import pretrain

TRIALS = 8


SEED = 100  # of all trials; no reported run has it


SUBSETS = 10


TUNED = ("moco", "mse-normalized", "barlow-conditioned", "mse-standardized")


# As released: the stage weights stay what they are, everything else is what MoCo got.
AS_RELEASED = {"mse": "moco", "barlow": "moco"}


SHARED = {"lr": (0.03, 0.06, 0.12), "temperature": (0.1, 0.2), "crop": (0.2, 0.4, 0.7)}


STAGES = ((1, 1, 1, 1), (0, 1, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0))


WEIGHTS = {"mse-normalized": (0.1, 3.0), "barlow-conditioned": (0.003, 0.3), "mse-standardized": (0.1, 3.0)}


WARM_UP = {"mse-standardized": (0.0, 0.5)}


def draw_trials(arm: str, count: int = TRIALS) -> list[dict]:
    """The changes to a recipe in each trial of an arm, the same at every call; the first trial changes nothing."""
    shared, own = np.random.default_rng((SEED, 0)), np.random.default_rng((SEED, 1))
    grid = [dict(zip(SHARED, values, strict=True)) for values in itertools.product(*SHARED.values())]
    trials = [grid[number] for number in shared.permutation(len(grid))[: count - 1]]
    for trial in trials if arm in WEIGHTS else []:
        weight = float(np.exp(own.uniform(*np.log(WEIGHTS[arm]))))
        trial["stage_weights"] = [round(weight, 4) * on for on in STAGES[own.integers(len(STAGES))]]
        if arm in WARM_UP:
            trial["stage_warmup"] = WARM_UP[arm][own.integers(2)]
    return [{}, *trials]


def changed(name: str, arm: str, data: MedicalImages, seed: int, changes: dict) -> Recipe:
    """`preset` with the changes of a trial; "crop" is a field of its views.

    The precision is fixed, since "auto" would mean another arithmetic on another processor.
    """
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    crop = fields.pop("crop", None)
    recipe = preset(name, arm, data, seed, **{"precision": "fp32"} | fields)
    return recipe if crop is None else dataclasses.replace(recipe, views=dataclasses.replace(recipe.views, crop=crop))


def without_test(data: MedicalImages) -> MedicalImages:
    """The data set without its test rows: no image and no label of them is left to look at."""
    kept = np.flatnonzero(np.asarray(data.split) != TEST)
    arrays = {name: getattr(data, name)[kept] for name in ("images", "labels", "patients", "split")}
    return dataclasses.replace(data, **arrays)


def try_out(dataset: str, arm: str, trial: int, preset_name: str, runs_dir: str) -> dict:
    """Pretrain one trial and judge it: the mean validation AUC of linear evaluation at the smallest label fraction.

    Returns:
        One row: arm, dataset, trial, validation AUC, the changes and the recipe's key.
    """
    data, plan, changes = without_test(load(dataset)), EVALUATIONS[preset_name], draw_trials(arm)[trial]
    run = pretrain(changed(preset_name, arm, data, SEED, changes), data, runs_dir, progress=False)
    encoder = run.load_encoder()
    features = {split: encode(encoder, data, data.rows(split)) for split in ("train", "val")}
    subsets = [label_subset(data, plan.fractions[0], subset_seed(SEED, subset)) for subset in range(SUBSETS)]
    auc = np.mean([best_probe(features, data, rows, plan)[1] for rows in subsets])
    about = {"arm": arm, "dataset": dataset, "trial": trial, "validation_auc": auc}
    return about | {"changes": json.dumps(changes), "recipe": run.recipe.key}


def choose(trials: pd.DataFrame) -> dict[str, dict]:
    """The changes of each arm's best trial: one for all data sets, by the mean of their validation AUCs.

    The mean over several sets is less at the mercy of one small validation split than a choice per set would be.
    """
    found = {}
    for arm, part in trials.groupby("arm", sort=False):
        best = part.groupby("trial")["validation_auc"].mean().idxmax()
        found[arm] = json.loads(part.loc[part["trial"] == best, "changes"].iloc[0])
    return found | {arm: found[base] for arm, base in AS_RELEASED.items() if base in found}


def write_settings(trials: pd.DataFrame, folder: Path) -> dict[str, dict]:
    """Write `tuning.csv` with every trial and `settings.json` with what was chosen."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = trials.sort_values(["arm", "trial", "dataset"], ignore_index=True)
    atomic_write(folder / "tuning.csv", lambda path: trials.to_csv(path, index=False, float_format="%.4f"))
    settings = choose(trials)
    atomic_write(folder / "settings.json", lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))
    return settings


def read_settings(folder: Path) -> dict[str, dict]:
    """The changes that tuning chose for each arm; none where there was no tuning."""
    file = folder / "settings.json"
    return json.loads(file.read_text()) if file.is_file() else {}
