"""TODO mocolayers.evaluation.judge."""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from mocolayers.data.labels import class_matrix, label_subset, subset_seed
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.features import STAGES, encode_splits, kept_stage_features, pixel_features
from mocolayers.evaluation.finetune import Classifier, fine_tune
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import patient_bootstrap, scores
from mocolayers.method.moco import build_encoder
from mocolayers.recipe import Evaluation
from mocolayers.runtime import atomic_write, resolve_device
from mocolayers.training.distributed import from_first
from mocolayers.training.runs import Run, load_weights, save_weights, unfilled

MODES = ("linear", "finetune")


def evaluate(
    run: Run,
    data: MedicalImages,
    mode: str,
    fraction: float,
    subset: int,
    plan: Evaluation,
    device: str = "auto",
    features: Callable[[], dict[str, np.ndarray]] | None = None,
) -> dict:
    """Judge a finished run once, or read the result if that has been done already.

    Args:
        run: a finished pretraining.
        data: the data set to judge on.
        mode: "linear", "finetune", or with `features` any name that tells which features these are.
        fraction: label fraction.
        subset: number of the draw within the run's seed: of the label subset, and in fine-tuning also of the new layer,
            the order of the rows and the augmentation. So with all labels another subset is the same labels again.
        plan: see `Evaluation`.
        features: returns what `encode_splits` does; lets many linear evaluations share one encoding, or judges other
            frozen features than the embedding.
    Returns:
        One row: arm, dataset, fraction, seed, subset, mode, labels, auc, low, high, other metrics, seconds, recipe key.
        Test probabilities are kept beside it as `.npz`.
    """
    if mode not in MODES and features is None:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}, or give the features to judge")
    place = evaluation_file(run, data, mode, fraction, subset, plan)
    beside = (".json", ".npz", ".safetensors") if mode == "finetune" else (".json", ".npz")
    if from_first(lambda: all(place.with_suffix(ending).is_file() for ending in beside)):
        return json.loads(place.read_text())
    started = time.perf_counter()
    seed = run.recipe.seed
    rows = label_subset(data, fraction, subset_seed(seed, subset))
    place.parent.mkdir(parents=True, exist_ok=True)
    if mode != "finetune":
        encoded = features() if features else encode_splits(run.load_encoder().to(resolve_device(device)), data)
        probabilities, _ = from_first(lambda: linear_evaluation(encoded, data, rows, plan))
    else:
        model = fine_tune(run.load_encoder(), data, rows, plan, fine_tuning_seed(seed, subset), device)
        probabilities = model.predict(data, data.rows("test"))
        from_first(lambda: save_weights(model, place.with_suffix(".safetensors")))
    row = describe(run, data, probabilities, plan) | {
        "mode": mode,
        "fraction": fraction,
        "subset": subset,
        "labels": len(rows),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return from_first(lambda: _kept(place, probabilities, row))


def _kept(place: Path, probabilities: np.ndarray, row: dict) -> dict:
    atomic_write(place.with_suffix(".npz"), lambda path: _save_compressed(path, probabilities))
    atomic_write(place, lambda path: path.write_text(json.dumps(row, indent=1)))
    return row


def _save_compressed(path: Path, probabilities: np.ndarray) -> None:
    with path.open("wb") as file:  # numpy would add its own ending to a name
        np.savez_compressed(file, test=probabilities)


def fine_tuned(
    run: Run, data: MedicalImages, fraction: float, subset: int, plan: Evaluation, device: str = "auto"
) -> tuple[Classifier, np.ndarray]:
    """The classifier that `evaluate` fine-tunes and keeps, in evaluation mode, with its (n_test, L) probabilities."""
    evaluate(run, data, "finetune", fraction, subset, plan, device)
    place = evaluation_file(run, data, "finetune", fraction, subset, plan)
    model = unfilled(lambda: Classifier(build_encoder(run.recipe), data.task, len(data.classes)))
    load_weights(model, place.with_suffix(".safetensors"))
    with np.load(place.with_suffix(".npz")) as kept:
        return model.eval(), kept["test"]


def describe(run: Run, data: MedicalImages, probabilities: np.ndarray, plan: Evaluation) -> dict:
    """Scores and interval of test probabilities, with what they belong to."""
    test = data.rows("test")
    classes = class_matrix(data, test)
    low, high = patient_bootstrap(classes, probabilities, data.patients[test], plan.resamples)
    recipe = run.recipe
    about = {"arm": recipe.arm, "dataset": recipe.dataset, "seed": recipe.seed, "recipe": recipe.key}
    return about | scores(data.task, classes, probabilities) | {"low": low, "high": high}


def fine_tuning_seed(seed: int, subset: int) -> int:
    """The seed of `fine_tune` for the n-th subset of a pretraining seed; that of the first is the pretraining's own."""
    return seed + 1000 * subset


def evaluation_file(run: Run, data: MedicalImages, mode: str, fraction: float, subset: int, plan: Evaluation) -> Path:
    """Where the result of `evaluate` is kept; another plan, or other images than the run's, is another file."""
    tag = hashlib.sha256(repr(plan).encode()).hexdigest()[:6]
    if data.fingerprint != run.recipe.fingerprint:
        tag += f"-{data.fingerprint}"
    return run.folder / "evaluations" / f"{mode}-{fraction:g}-{subset}-{tag}.json"


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


def judge(
    run: Run,
    data: MedicalImages,
    plan: Evaluation,
    fraction: float,
    subset: int = 0,
    protocol: str = "linear",
    stage: int = 4,
    source: str = "encoder",
    pool: int = 1,
    device: str = "auto",
) -> dict:
    """Stand-in: one row with the agreed columns, made by `evaluate`."""
    if protocol == "finetune":
        row = evaluate(run, data, "finetune", fraction, subset, plan, device)
    elif source == "pixels":
        row = evaluate(run, data, "pixels", fraction, subset, plan, features=lambda: pixel_features(data))
    else:
        mode = "linear" if (stage, pool) == (4, 1) else f"stage{stage}pool{pool}"
        features = functools.partial(_of_stage, run, data, pool, stage)
        row = evaluate(run, data, mode, fraction, subset, plan, features=features)
    about = {"dataset": run.recipe.dataset, "judged_on": data.name, "arm": run.recipe.arm, "seed": run.recipe.seed}
    about |= {"fraction": fraction, "subset": subset, "protocol": protocol, "stage": stage, "source": source}
    about |= {"pool": pool, "labels": row["labels"], "labels_read": row["labels"], "auc": row["auc"]}
    about |= {name: row.get(name) for name in ("low", "high", "f1", "kappa", "seconds", "recipe")}
    return about | {"weights": run.weights_hash}


def judge_all(
    run: Run,
    data: MedicalImages,
    plan: Evaluation,
    protocols: tuple[str, ...] = ("linear", "finetune"),
    stages: tuple[int, ...] = (4,),
    fine_tunings: int = 1,
    device: str = "auto",
    **probed: str | int,
) -> pd.DataFrame:
    """Stand-in: every row that makes sense for an arm."""
    possible = {"random": ("linear",), "supervised": ("finetune",)}.get(run.recipe.arm, protocols)
    rows = []
    for protocol in (name for name in protocols if name in possible):
        most, places = (plan.subsets, stages) if protocol == "linear" else (fine_tunings, (4,))
        for stage in places:
            cells = [(fraction, n) for fraction in plan.fractions for n in range(most if fraction < 1 else 1)]
            about = probed if protocol == "linear" else {}
            rows += [judge(run, data, plan, f, n, protocol, stage, device=device, **about) for f, n in cells]
    return pd.DataFrame(rows)
