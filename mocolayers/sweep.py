"""The grid behind the results: arms x data sets x seeds, pretrained, judged and written to a table."""

import functools
import itertools
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mocolayers.datasets import MedicalImages, load
from mocolayers.files import atomic_write
from mocolayers.finetune import encode_splits, evaluate
from mocolayers.pretrain import pretrain
from mocolayers.recipe import ARMS, EVALUATIONS, Evaluation, preset
from mocolayers.runs import Run

COLUMNS = ("dataset", "arm", "fraction", "seed", "subset", "mode", "labels", "auc", "low", "high", "f1", "kappa")


def judge(run: Run, data: MedicalImages, plan: Evaluation, device: str = "auto", modes=None) -> list[dict]:
    """Every evaluation that makes sense for an arm, one row each.

    An untrained encoder is only judged by linear evaluation ("random"), since fine-tuning it is training from scratch
    ("supervised"), which in turn is only judged by fine-tuning.

    Args:
        run: a finished pretraining.
        data: the data set to judge on.
        plan: fractions, subsets and so on.
        device: see `pretrain`.
        modes: leave out "linear" or "finetune"; None means both.
    """
    only = {"random": ("linear",), "supervised": ("finetune",)}.get(run.recipe.arm, ("linear", "finetune"))
    wanted = [mode for mode in only if modes is None or mode in modes]
    rows = []
    # Encoded once for all linear evaluations, and not at all if every result is on disk.
    features = functools.cache(lambda: encode_splits(run.load_encoder(), data))
    for mode, fraction in itertools.product(wanted, plan.fractions):
        subsets = plan.subsets if mode == "linear" and fraction < 1 else 1
        for subset in range(subsets):
            rows.append(evaluate(run, data, mode, fraction, subset, plan, device, features))
    return rows


def run_cell(dataset: str, arm: str, seed: int, preset_name: str, runs_dir: str, threads: int | None) -> list[dict]:
    """Pretrain and judge one arm on one data set from one seed; what is on disk is not done again."""
    if threads:
        torch.set_num_threads(threads)
    data = load(dataset)
    with threadpool_limits(threads):
        run = pretrain(preset(preset_name, arm, data, seed), data, runs_dir, progress=False)
        return judge(run, data, EVALUATIONS[preset_name])


def sweep(
    datasets: list[str],
    seeds: list[int],
    preset_name: str = "lesson",
    arms: tuple[str, ...] = ARMS,
    runs_dir: str = "runs",
    jobs: int | None = None,
) -> pd.DataFrame:
    """Run the grid in several processes of one thread each, with a progress bar; it resumes where it was stopped.

    Returns:
        One row per evaluation, sorted, with the columns of `evaluate`.
    """
    jobs = jobs or os.cpu_count()
    cells = [(dataset, arm, seed) for seed in seeds for dataset in datasets for arm in arms]
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        threads = max(1, os.cpu_count() // jobs)
        waiting = {pool.submit(run_cell, *cell, preset_name, runs_dir, threads): cell for cell in cells}
        with tqdm(total=len(cells), desc="arms x data sets x seeds", unit="cell") as bar:
            for done in as_completed(waiting):
                rows += done.result()
                bar.set_postfix_str(" ".join(map(str, waiting[done])))
                bar.update()
    table = pd.DataFrame(rows)
    first = [name for name in COLUMNS if name in table]
    table = table[first + [name for name in table if name not in first]]
    return table.sort_values(["dataset", "arm", "mode", "fraction", "seed", "subset"], ignore_index=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a results table as CSV, atomically, four digits after the point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.4f"))
