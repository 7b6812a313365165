"""Why do models differ? Probes on each stage, similarity before and after fine-tuning, distance between outputs.

Everything here works on finished runs and returns tables; the measures themselves are in `similarity` (CKA) and
`distributions` (KS).
"""

import functools

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from mocolayers.datasets import MedicalImages, class_matrix
from mocolayers.distributions import (
    check_probabilities,
    columns_of,
    constant_columns,
    flatten,
    ks_by_class,
    ks_interval,
    ks_pooled,
    matching_temperature,
)
from mocolayers.encoder import StagedResNet
from mocolayers.files import atomic_write
from mocolayers.finetune import evaluate, fine_tuned
from mocolayers.metrics import calibration_error
from mocolayers.recipe import Evaluation
from mocolayers.runs import Run
from mocolayers.similarity import cka, cka_null, patient_interval, released_cka
from mocolayers.views import batches, to_float

STAGES = (1, 2, 3, 4)
PIXEL_SIDE = 28
SPLITS = ("train", "val", "test")


@torch.no_grad()
def stage_features(
    encoder: StagedResNet, data: MedicalImages, rows: np.ndarray, pool: int = 1, batch: int = 250
) -> list[np.ndarray]:
    """What each of the four stages says of the given rows, with batch-norm in evaluation mode.

    Args:
        encoder: any `StagedResNet`.
        data: its images.
        rows: (n,) row numbers.
        pool: each stage's map is averaged to pool x pool places; 1 is the global average.
        batch: images per forward pass.
    Returns:
        Four float32 arrays (n, C_l * pool * pool). With pool=1 the last one is the embedding.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    parts = []
    for x in batches(data, rows, device, batch):
        stages = encoder(x).stages
        parts.append([F.adaptive_avg_pool2d(stage, pool).flatten(1).float().cpu().numpy() for stage in stages])
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


def kept_stage_features(run: Run, data: MedicalImages, pool: int = 1) -> list[dict[str, np.ndarray]]:
    """Features of a run per stage and split, rows as in `data.rows(split)`; computed once and kept with the run."""
    place = run.folder / "features" / f"{data.fingerprint}-pool{pool}.safetensors"
    if not place.is_file():
        encoder, found = run.load_encoder(), {}
        for split in SPLITS:
            for stage, array in zip(STAGES, stage_features(encoder, data, data.rows(split), pool), strict=True):
                found[f"{split}.{stage}"] = array
        place.parent.mkdir(exist_ok=True)
        atomic_write(place, lambda path: save_file(found, path))
    arrays = load_file(place)
    return [{split: arrays[f"{split}.{stage}"] for split in SPLITS} for stage in STAGES]


def pixel_features(data: MedicalImages) -> dict[str, np.ndarray]:
    """The images themselves as features, averaged to at most 28 x 28 pixels: (n, 28 * 28 * C) per split."""
    found = {}
    for split in SPLITS:
        x = to_float(torch.from_numpy(data.images[data.rows(split)]))
        if data.side > PIXEL_SIDE:
            x = F.adaptive_avg_pool2d(x, PIXEL_SIDE)
        found[split] = x.flatten(1).numpy()
    return found


def probe_stages(
    run: Run, data: MedicalImages, plan: Evaluation, pool: int = 1, fractions: tuple[float, ...] | None = None
) -> pd.DataFrame:
    """Logistic regression on every stage, on every label subset of the plan.

    With pool=1 the probe of stage 4 *is* the linear evaluation of the run: same call, same kept result.

    Args:
        run: a finished pretraining.
        data: the data set to judge on.
        plan: see `Evaluation`.
        pool: see `stage_features`.
        fractions: label fractions; None means those of the plan.
    Returns:
        The rows of `evaluate` with a column "stage", 1 to 4.
    """
    tables = []
    for stage in STAGES:
        mode = "linear" if (stage, pool) == (4, 1) else f"stage{stage}pool{pool}"
        features = functools.partial(_of_stage, run, data, pool, stage)
        table = probe(run, data, plan, mode, features, fractions or plan.fractions)
        tables.append(table.assign(stage=stage))
    return pd.concat(tables, ignore_index=True)


def probe_pixels(run: Run, data: MedicalImages, plan: Evaluation) -> pd.DataFrame:
    """The same probe on raw pixels, as arm "pixels" at stage 0; `run` only lends its seed and its folder."""
    table = probe(run, data, plan, "pixels", functools.partial(pixel_features, data), plan.fractions)
    return table.assign(arm="pixels", stage=0)


def _of_stage(run: Run, data: MedicalImages, pool: int, stage: int) -> dict[str, np.ndarray]:
    return kept_stage_features(run, data, pool)[stage - 1]


def probe(run: Run, data: MedicalImages, plan: Evaluation, mode: str, features, fractions) -> pd.DataFrame:
    """One row of `evaluate` per fraction and label subset, for linear evaluation of any features."""
    cells = [(fraction, n) for fraction in fractions for n in range(plan.subsets if fraction < 1 else 1)]
    return pd.DataFrame([evaluate(run, data, mode, f, n, plan, features=features) for f, n in cells])


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


def output_distances(
    run: Run, data: MedicalImages, plan: Evaluation, fraction: float, subset: int = 0, device: str = "auto"
) -> pd.DataFrame:
    """KS distance between the outputs of this encoder fine-tuned on some labels and on all, on the same test rows.

    Args:
        run: a finished pretraining.
        data: whose test rows are used.
        plan, device: of the fine-tunings.
        fraction, subset: labels of the first model; the second has all of them.
    Returns:
        One row per compared class, then "mean" (over classes, with a 95% interval `low`, `high` that resamples test
        patients) and "pooled" (all classes in one sample). Columns: `ks`; `floor`, of two models with all labels that
        differ only in their fine-tuning seed; `flattened`, of the model with all labels and itself made as flat as the
        first model, which ranks alike; `matched`, of the first model and that flattened one: what is left when
        flatness is equal; `temperature` does the flattening; `note` says what makes a row worthless.
    """
    rows = data.rows("test")
    small = fine_tuned(run, data, fraction, subset, plan, device)[1]
    large, twin = (fine_tuned(run, data, 1.0, draw, plan, device)[1] for draw in (0, 1))
    table = compare_outputs(small, large, twin, data.task)
    names = [data.classes[column] for column in columns_of(data.task, len(data.classes))]
    table.insert(0, "class", [*names, "mean", "pooled"])
    classes = class_matrix(data, rows)
    table["note"] = [*_notes(small, large, classes, data.task), "", ""]
    interval = ks_interval([(small, large)], data.task, data.patients[rows], plan.resamples)
    table.loc[table["class"] == "mean", ["low", "high"]] = interval[1:]
    table["ece"], table["ece_all"] = (calibration_error(classes, p, data.task) for p in (small, large))
    return _about(run, table, fraction).assign(subset=subset)


def compare_outputs(small: np.ndarray, large: np.ndarray, twin: np.ndarray, task: str) -> pd.DataFrame:
    """The distances of `output_distances` from three models' (n, L) probabilities: classes, then mean, then pooled."""
    for p, owner in ((small, "the model with few labels"), (large, "the model with all"), (twin, "its twin")):
        check_probabilities(p, owner)
    temperature = matching_temperature(large, small, task)
    flat = flatten(large, task, temperature)
    pairs = {"ks": (small, large), "floor": (large, twin), "flattened": (large, flat), "matched": (small, flat)}
    columns = {}
    for name, (first, second) in pairs.items():
        each = ks_by_class(first, second, task)[0]
        columns[name] = [*each, each.mean(), ks_pooled(first, second, task)]
    return pd.DataFrame(columns).assign(temperature=temperature)


def _notes(small: np.ndarray, large: np.ndarray, classes: np.ndarray, task: str) -> list[str]:
    notes = []
    for column in columns_of(task, classes.shape[1]):
        said = []
        for p, name in ((small, "few"), (large, "all")):
            if constant_columns(p)[column]:
                said.append(f"the model with {name} labels says the same of every image")
        if classes[:, column].all() or not classes[:, column].any():
            said.append("the test split has one kind of image only")
        notes.append("; ".join(said))
    return notes


def _about(run: Run, table: pd.DataFrame, fraction: float) -> pd.DataFrame:
    recipe = run.recipe
    for place, (name, value) in enumerate(
        {"dataset": recipe.dataset, "arm": recipe.arm, "seed": recipe.seed, "fraction": fraction}.items()
    ):
        table.insert(place, name, value)
    return table.assign(recipe=recipe.key)
