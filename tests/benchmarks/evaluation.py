"""Judging encoders: linear evaluation against a probe trained by SGD, CKA and KS distance."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from phantom import chest_phantom
from torch import nn
from torch.nn import functional as F

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import batches
from mocolayers.evaluation.distributions import ks_distance
from mocolayers.evaluation.features import SPLITS, stage_features
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc
from mocolayers.evaluation.similarity import cka
from mocolayers.recipe import EVALUATIONS, preset
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run

EPOCHS, FRACTIONS = 100, (0.1, 1.0)
CKA_ROWS, KS_ROWS, KS_RESAMPLES, WIDTH = (1000, 5000, 20_000), (1000, 20_000), 500, 128


def linear_table() -> pd.DataFrame:
    """One row per method and label fraction: seconds and test AUC, features included, from one pretrained encoder."""
    with tempfile.TemporaryDirectory() as folder:
        data = chest_phantom(Path(folder) / "data", 1500)
        run = pretrain(preset("lesson", "moco", data, steps=60), data, Path(folder) / "runs", "cpu", progress=False)
        return pd.DataFrame(
            [row for fraction in FRACTIONS for row in linear_rows(run, data, fraction)],
            columns=["linear evaluation", "labels", "seconds", "test AUC"],
        )


def linear_rows(run: Run, data: MedicalImages, fraction: float) -> list[list[str]]:
    rows, truth = label_subset(data, fraction, 0), class_matrix(data, data.rows("test"))
    methods = {
        "ours: features once, logistic regression, 5 penalties on validation": by_regression,
        f"SGD probe, {EPOCHS} epochs, every epoch through the encoder": by_sgd,
        f"SGD probe, {EPOCHS} epochs, on features": by_sgd_on_features,
    }
    lines = []
    for name, method in methods.items():
        encoder = run.load_encoder()
        seconds, p = timed(lambda method=method, encoder=encoder: method(encoder, data, rows))
        lines.append([name, f"{fraction:.0%}", f"{seconds:.2f}", f"{macro_auc(truth, p)[0]:.3f}"])
    return lines


def embeddings(encoder: nn.Module, data: MedicalImages) -> dict[str, np.ndarray]:
    return {split: stage_features(encoder, data, data.rows(split), device="cpu")[3] for split in SPLITS}


def by_regression(encoder: nn.Module, data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    return linear_evaluation(embeddings(encoder, data), data, rows, EVALUATIONS["lesson"])[0]


def by_sgd(encoder: nn.Module, data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """The usual probe: the frozen encoder sees every image again in every epoch."""

    @torch.no_grad()
    def features(part: np.ndarray) -> torch.Tensor:
        return torch.cat([encoder.eval()(x).embedding for x in batches(data, part, torch.device("cpu"), 64)])

    return sgd_probe(features, data, rows)


def by_sgd_on_features(encoder: nn.Module, data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """The same probe with every image encoded once."""
    cached = embeddings(encoder, data)
    place = {split: data.rows(split) for split in cached}
    whole = np.zeros((len(data.images), encoder.dim), np.float32)
    for split, found in place.items():
        whole[found] = cached[split]
    return sgd_probe(lambda part: torch.from_numpy(whole[part]), data, rows)


def sgd_probe(features: Callable[[np.ndarray], torch.Tensor], data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """(n_test, L) probabilities of a linear layer after batch-norm, trained with momentum and a cosine."""
    rng, classes = np.random.default_rng(0), torch.from_numpy(class_matrix(data, rows).argmax(axis=1))
    width = features(rows[:2]).shape[1]
    probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, len(data.classes)))
    optimiser = torch.optim.SGD(probe.parameters(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for part in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // 64)):
            loss = F.cross_entropy(probe(features(rows[part])), classes[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        return probe.eval()(features(data.rows("test"))).softmax(dim=1).numpy()


def distance_table() -> pd.DataFrame:
    """One row per size: seconds of one CKA of random features, and of one KS distance with its resamples."""
    rng, lines = np.random.default_rng(0), []
    for n in CKA_ROWS:
        x, y = rng.normal(size=(2, n, WIDTH))
        for kernel in ("linear", "rbf"):
            seconds, _ = timed(lambda x=x, y=y, kernel=kernel: cka(x, y, kernel))
            lines.append([f"CKA, {kernel}, {WIDTH} features", f"{n:,}", f"{seconds:.3f}"])
    for n in KS_ROWS:
        first, second = rng.random((2, n))
        weights = rng.poisson(1, (KS_RESAMPLES, n)).astype(float)
        lines.append(["KS distance", f"{n:,}", f"{timed(lambda f=first, s=second: ks_distance(f, s))[0]:.3f}"])
        seconds, _ = timed(lambda first=first, second=second, w=weights: ks_distance(first, second, w))
        lines.append([f"KS distance, {KS_RESAMPLES} resamples", f"{n:,}", f"{seconds:.3f}"])
    return pd.DataFrame(lines, columns=["measure", "rows", "seconds"])


def timed(function: Callable) -> tuple[float, object]:
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found
