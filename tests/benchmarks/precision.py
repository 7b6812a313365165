"""Does bf16 change what is learned? The same recipe in fp32 and in bf16, paired by seed."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from phantom import chest_phantom
from tqdm import tqdm

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import MedicalImages
from mocolayers.evaluation.features import run_features
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc
from mocolayers.recipe import EVALUATIONS, preset
from mocolayers.training.pretrain import pretrain
from study.report import repeated

PRECISIONS = ("fp32", "bf16")


def auc(data: MedicalImages, precision: str, seed: int, steps: int, runs_dir: Path) -> tuple[float, float]:
    """Test AUC of linear evaluation with all labels after pretraining, and the seconds of the pretraining."""
    recipe = preset("lesson", "moco", data, seed, steps=steps, precision=precision)
    started = time.perf_counter()
    run = pretrain(recipe, data, runs_dir, "cpu", progress=False)
    seconds = time.perf_counter() - started
    features = run_features(run, data, device="cpu")[3]
    p, _ = linear_evaluation(features, data, label_subset(data, 1.0, seed), EVALUATIONS["lesson"])
    return macro_auc(class_matrix(data, data.rows("test")), p)[0], seconds


def table(seeds: int = 5, steps: int = 200, images: int = 1500) -> pd.DataFrame:
    """One row per precision, and their difference with its 95% interval over seeds (Student-t, paired)."""
    with tempfile.TemporaryDirectory() as folder:
        data = chest_phantom(Path(folder) / "data", images)
        found = np.array(
            [
                [auc(data, precision, seed, steps, Path(folder) / "runs") for precision in PRECISIONS]
                for seed in tqdm(range(seeds), desc="seeds")
            ]
        )  # (seeds, precisions, 2)
    rows = [
        [name, f"{found[:, i, 0].mean():.3f}", f"{np.median(found[:, i, 1]):.1f}"] for i, name in enumerate(PRECISIONS)
    ]
    change = found[:, 1, 0] - found[:, 0, 0]
    low, high = (repeated(change)[end] for end in ("low", "high"))
    rows.append(["bf16 - fp32, 95% interval", f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]", ""])
    return pd.DataFrame(rows, columns=[f"{seeds} seeds, {steps} steps", "test AUC", "seconds"])
