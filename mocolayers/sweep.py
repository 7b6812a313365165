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

from mocolayers.analysis import feature_reuse, output_distances, probe_pixels, probe_stages
from mocolayers.datasets import MedicalImages, load
from mocolayers.distributions import ks_interval
from mocolayers.files import atomic_write
from mocolayers.finetune import encode_splits, evaluate, fine_tuned
from mocolayers.pretrain import pretrain
from mocolayers.recipe import ARMS, EVALUATIONS, Evaluation, preset
from mocolayers.runs import Run

COLUMNS = ("dataset", "arm", "fraction", "seed", "subset", "mode", "labels", "auc", "low", "high", "f1", "kappa")
ORDER = ("dataset", "arm", "mode", "stage", "fraction", "seed", "subset")
FINE_TUNED_SUBSETS = 3


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


def run_cell(dataset: str, arm: str, seed: int, preset_name: str, runs_dir: str) -> dict[str, pd.DataFrame]:
    """Pretrain, judge and analyse one arm on one data set from one seed; what is on disk is not done again.

    Returns:
        Parts of the tables of `sweep`, by name.
    """
    data, plan = load(dataset), EVALUATIONS[preset_name]
    run = pretrain(preset(preset_name, arm, data, seed), data, runs_dir, progress=False)
    tables = {"low_label": pd.DataFrame(judge(run, data, plan))}
    if arm != "supervised":  # before fine-tuning its encoder is the random one
        probes = [probe_stages(run, data, plan)] + ([probe_pixels(run, data, plan)] if arm == "random" else [])
        tables["probing"] = pd.concat(probes)
    if arm != "random":  # fine-tuning it is "supervised"
        few, every = plan.fractions[:-1], plan.fractions[-1]
        tables["similarity"] = pd.concat([feature_reuse(run, data, plan, f) for f in (few[0], every)])
        draws = itertools.product(few, range(FINE_TUNED_SUBSETS))
        tables["outputs"] = pd.concat([output_distances(run, data, plan, f, subset) for f, subset in draws])
    return tables


def summarise_outputs(
    dataset: str, arm: str, seeds: list[int], preset_name: str, runs_dir: str
) -> dict[str, pd.DataFrame]:
    """KS distance of few labels to all labels over every seed and subset, beside the floor between seeds."""
    data, plan = load(dataset), EVALUATIONS[preset_name]
    patients = data.patients[data.rows("test")]
    runs = [Run(preset(preset_name, arm, data, seed), runs_dir) for seed in seeds]
    every = [fine_tuned(run, data, plan.fractions[-1], 0, plan)[1] for run in runs]
    twins = [fine_tuned(run, data, plan.fractions[-1], 1, plan)[1] for run in runs]
    pairs = {"100% twice, same encoder": list(zip(every, twins, strict=True))}
    if len(runs) > 1:
        pairs["100% twice, other seeds"] = list(itertools.combinations(every, 2))
    for fraction in plan.fractions[:-1]:
        some = itertools.product(zip(runs, every, strict=True), range(FINE_TUNED_SUBSETS))
        pairs[f"{fraction:.0%} and 100%"] = [
            (fine_tuned(run, data, fraction, n, plan)[1], large) for (run, large), n in some
        ]
    rows = []
    for name, models in pairs.items():
        mean, low, high = ks_interval(models, data.task, patients, plan.resamples)
        rows.append({"models": name, "ks": mean, "low": low, "high": high, "pairs": len(models)})
    table = pd.DataFrame(rows)
    table.insert(0, "arm", arm)
    table.insert(0, "dataset", dataset)
    return {"outputs_summary": table}


def sweep(
    datasets: list[str],
    seeds: list[int],
    preset_name: str = "lesson",
    arms: tuple[str, ...] = ARMS,
    runs_dir: str = "runs",
    jobs: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Run the grid in several processes of one thread each, with a progress bar; it resumes where it was stopped.

    Returns:
        Sorted tables: "low_label" (see `evaluate`), "probing" (see `probe_stages`), "similarity" (see
        `feature_reuse`), "outputs" (see `output_distances`) and "outputs_summary" (see `summarise_outputs`).
    """
    jobs = jobs or os.cpu_count()
    cells = [(dataset, arm, seed, preset_name, runs_dir) for seed in seeds for dataset in datasets for arm in arms]
    parts = _in_processes(run_cell, cells, jobs, "arms x data sets x seeds")
    tuned = [arm for arm in arms if arm != "random"]
    cells = [(dataset, arm, seeds, preset_name, runs_dir) for dataset in datasets for arm in tuned]
    parts += _in_processes(summarise_outputs, cells, jobs, "distances over seeds")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _ordered(pd.concat([part[name] for part in parts if name in part])) for name in names}


def _in_processes(function, cells: list[tuple], jobs: int, title: str) -> list[dict[str, pd.DataFrame]]:
    """Call a function on every cell, in processes that share the cores; in order of completion."""
    found, threads = [], max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_with_threads, threads, function, cell): cell for cell in cells}
        with tqdm(total=len(cells), desc=title, unit="cell") as bar:
            for done in as_completed(waiting):
                found.append(done.result())
                bar.set_postfix_str(" ".join(map(str, waiting[done][:3])))
                bar.update()
    return found


def _with_threads(threads: int, function, cell: tuple):
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        return function(*cell)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    first = [name for name in COLUMNS if name in table]
    table = table[first + [name for name in table if name not in first]]
    order = [name for name in ORDER if name in table]
    return table.sort_values(order, ignore_index=True, kind="stable")


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write each table as `folder/NAME.csv`, atomically, four digits after the point."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        text = functools.partial(table.to_csv, index=False, float_format="%.4f")
        atomic_write(folder / f"{name}.csv", text)
