"""One way for a row: features or fine-tuning, then scores, then one row that is kept with the run."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mocolayers.data.labels import class_matrix, label_subset, subset_seed
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.features import SPLITS, STAGES, pixel_features, run_features
from mocolayers.evaluation.finetune import Classifier, fine_tune
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import patient_bootstrap, scores
from mocolayers.recipe import Evaluation
from mocolayers.runtime import DatasetError
from mocolayers.training.distributed import from_first
from mocolayers.training.runs import Run, build_encoder, read_kept, save_kept, unfilled


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
    """One row of results, made once and then read.

    Args:
        data: what to judge on; not always what the run was trained on.
        fraction, subset: which label subset; the subset also draws the new layer, order and views of a fine-tuning.
        protocol: "linear" or "finetune".
        stage, source, pool: for "linear": a stage from 1 to 4 of the "encoder", averaged to pool x pool places, or
            "pixels", for which the run only lends its seed.
    Returns:
        In this order: dataset (trained on), judged_on, arm, seed; the settings, with stage 0 for pixels; labels (that
        might be used), labels_read (different ones that were); auc, low, high (its 95% interval over patients), f1,
        kappa (NaN without grades), seconds; recipe and weights, the hashes of the run.
    Raises:
        ValueError: settings that mean nothing together.
        DatasetError: no images of a split, or test images of one class only.
        RunError: the run is not finished, or what is kept of it is damaged.
    """
    if source == "pixels":
        stage = 0
    settings = {"fraction": float(fraction), "subset": int(subset), "protocol": protocol}
    settings |= {"stage": int(stage), "source": source, "pool": int(pool)}
    probed = source == "pixels" or (source == "encoder" and stage in STAGES)
    if not (protocol == "linear" and probed) and (protocol, stage, source, pool) != ("finetune", 4, "encoder", 1):
        raise ValueError(
            f"no such row: {settings}; protocol is 'linear', of 'pixels' or of stage 1 to 4 of the 'encoder', or "
            "'finetune', of the whole encoder"
        )
    if empty := [split for split in SPLITS if not len(data.rows(split))]:
        raise DatasetError(f"{data.name} has no {empty[0]} images, which judging needs; prepare it with another split")
    place = _place(run, data, plan, settings)
    if kept := from_first(lambda: read_kept(place)[0]):
        return json.loads(kept) | {"judged_on": data.name}  # the same images may have another name
    started, seed = time.perf_counter(), run.recipe.seed
    rows, test, weights = label_subset(data, fraction, subset_seed(seed, subset)), data.rows("test"), {}
    if protocol == "finetune":
        model = fine_tune(run.load_encoder(), data, rows, plan, seed + 1000 * subset, device)
        probabilities, read, weights = model.predict(data, test), model.labels_read, model.state_dict()
    else:
        features = pixel_features(data) if source == "pixels" else run_features(run, data, pool, device)[stage - 1]
        probed = from_first(lambda: linear_evaluation(features, data, rows, plan, device))
        probabilities, read = probed[0], len(rows)
    classes = class_matrix(data, test)
    row = {"dataset": run.recipe.dataset, "judged_on": data.name, "arm": run.recipe.arm, "seed": seed} | settings
    found = scores(data.task, classes, probabilities)
    low, high = patient_bootstrap(classes, probabilities, data.patients[test], plan.resamples)
    row |= {"labels": len(rows), "labels_read": read, "auc": found.pop("auc"), "low": low, "high": high} | found
    row["seconds"] = round(time.perf_counter() - started, 2)
    row |= {"recipe": run.recipe.key, "weights": run.weights_hash}
    tensors = weights | {"probabilities": torch.from_numpy(probabilities)}
    from_first(lambda: save_kept(place, tensors, json.dumps(row)))
    return row


def _place(run: Run, data: MedicalImages, plan: Evaluation, settings: dict) -> Path:
    """The file of a row; its name holds a hash of everything that the row is made from."""
    made_from = {name: settings[name] for name in ("fraction", "subset", "protocol", "stage", "source", "pool")}
    # Fractions and subsets say how many rows there are, not what is in one.
    made_from["plan"] = dataclasses.asdict(dataclasses.replace(plan, fractions=(), subsets=0))
    # The task says how labels are scored, the modality how images are augmented; a fingerprint tells neither.
    made_from |= {"weights": run.weights_hash, "data": data.fingerprint}
    made_from["card"] = [data.task, data.modality, len(data.classes)]
    tag = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{settings['protocol']}-{settings['fraction']:g}-{settings['subset']}-{tag}.safetensors"
    return run.folder / "evaluations" / name


def fine_tuned(
    run: Run, data: MedicalImages, fraction: float, subset: int, plan: Evaluation, device: str = "auto"
) -> tuple[Classifier, np.ndarray]:
    """The classifier that `judge` fine-tunes and keeps, in evaluation mode, with its (n_test, L) probabilities."""
    row = judge(run, data, plan, fraction, subset, "finetune", device=device)
    weights = read_kept(_place(run, data, plan, row))[1]
    probabilities = weights.pop("probabilities").numpy()
    model = unfilled(lambda: Classifier(build_encoder(run.recipe), data.task, len(data.classes)))
    model.load_state_dict(weights)
    return model.eval(), probabilities


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
    """Every row that makes sense for an arm: all fractions of the plan, and below 100% several label subsets.

    "random" is never fine-tuned, since that is training from scratch: "supervised", which in turn is never probed.

    Args:
        fine_tunings: label subsets per fraction to fine-tune on; `plan.subsets` is for "linear".
        probed: `source` and `pool` of "linear", see `judge`.
    """
    left_out = {"random": "finetune", "supervised": "linear"}.get(run.recipe.arm)
    rows = []
    for protocol in (name for name in protocols if name != left_out):
        linear = protocol == "linear"
        most, about = (plan.subsets, probed) if linear else (fine_tunings, {})
        draws = [(fraction, n) for fraction in plan.fractions for n in range(most if fraction < 1 else 1)]
        for stage in stages if linear else (4,):
            rows += [judge(run, data, plan, *draw, protocol, stage, device=device, **about) for draw in draws]
    return pd.DataFrame(rows)
