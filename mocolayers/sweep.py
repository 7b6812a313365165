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

from mocolayers.analysis import feature_reuse, output_distances, probe, probe_pixels, probe_stages
from mocolayers.datasets import MedicalImages, data_folder, load
from mocolayers.distributions import ks_interval
from mocolayers.files import atomic_write
from mocolayers.finetune import encode_splits, evaluate, fine_tuned
from mocolayers.pretrain import pretrain
from mocolayers.recipe import ARMS, EVALUATIONS, Evaluation
from mocolayers.runs import Run
from mocolayers.tuning import TRIALS, TUNED, changed, try_out

COLUMNS = ("dataset", "arm", "fraction", "seed", "subset", "mode", "labels", "auc", "low", "high", "f1", "kappa")
ORDER = ("dataset", "arm", "mode", "stage", "fraction", "seed", "subset")
FINE_TUNED_SUBSETS = 3
OUTSIDE = {"retina": "idrid"}  # a data set of the same kind that judges the encoders of another


def judge(
    run: Run, data: MedicalImages, plan: Evaluation, device: str = "auto", modes=None, fine_tunings: int = 1
) -> list[dict]:
    """Every evaluation that makes sense for an arm, one row each.

    An untrained encoder is only judged by linear evaluation ("random"), since fine-tuning it is training from scratch
    ("supervised"), which in turn is only judged by fine-tuning.

    Args:
        run: a finished pretraining.
        data: the data set to judge on.
        plan: fractions, subsets and so on.
        device: see `pretrain`.
        modes: leave out "linear" or "finetune"; None means both.
        fine_tunings: label subsets per fraction below 100% to fine-tune on; `plan.subsets` is for linear evaluation.
    """
    only = {"random": ("linear",), "supervised": ("finetune",)}.get(run.recipe.arm, ("linear", "finetune"))
    wanted = [mode for mode in only if modes is None or mode in modes]
    rows = []
    # Encoded once for all linear evaluations, and not at all if every result is on disk.
    features = functools.cache(lambda: encode_splits(run.load_encoder(), data))
    for mode, fraction in itertools.product(wanted, plan.fractions):
        subsets = (plan.subsets if mode == "linear" else fine_tunings) if fraction < 1 else 1
        for subset in range(subsets):
            rows.append(evaluate(run, data, mode, fraction, subset, plan, device, features))
    return rows


def trained(dataset: str, arm: str, seed: int, preset_name: str, runs_dir: str, settings: dict) -> tuple:
    """The run of one cell with the settings of its arm, trained if it is not on disk, and its data."""
    data = load(dataset)
    return pretrain(changed(preset_name, arm, data, seed, settings.get(arm, {})), data, runs_dir, progress=False), data


def judge_cell(
    dataset: str, arm: str, seed: int, preset_name: str, runs_dir: str, settings: dict
) -> dict[str, pd.DataFrame]:
    """Pretrain and judge one arm on one data set from one seed; what is on disk is not done again.

    Encoders of a data set in `OUTSIDE` are also judged by linear evaluation on the other one, if it is prepared.

    Returns:
        The cell's part of the table "low_label".
    """
    run, data = trained(dataset, arm, seed, preset_name, runs_dir, settings)
    plan = EVALUATIONS[preset_name]
    rows = judge(run, data, plan, fine_tunings=FINE_TUNED_SUBSETS)
    outside = OUTSIDE.get(dataset)
    if outside and arm != "supervised" and (data_folder() / outside).is_dir():
        rows += judge_outside(run, load(outside), plan)
    return {"low_label": pd.DataFrame(rows)}


def judge_outside(run: Run, data: MedicalImages, plan: Evaluation) -> list[dict]:
    """Linear evaluation of a run on a data set that it was not trained on; its rows bear that data set's name."""
    features = functools.cache(lambda: encode_splits(run.load_encoder(), data))
    table = probe(run, data, plan, f"on-{data.name}", features, plan.fractions)
    return table.assign(dataset=data.name, mode="linear").to_dict("records")


def analyse_cell(
    dataset: str, arm: str, seed: int, preset_name: str, runs_dir: str, settings: dict
) -> dict[str, pd.DataFrame]:
    """The analyses of one cell: parts of the tables "probing", "similarity" and "outputs" of `sweep`."""
    run, data = trained(dataset, arm, seed, preset_name, runs_dir, settings)
    plan, tables = EVALUATIONS[preset_name], {}
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
    dataset: str, arm: str, seeds: list[int], preset_name: str, runs_dir: str, settings: dict
) -> dict[str, pd.DataFrame]:
    """KS distance of few labels to all labels over every seed and subset, beside the floor between seeds."""
    data, plan, changes = load(dataset), EVALUATIONS[preset_name], settings.get(arm, {})
    patients = data.patients[data.rows("test")]
    runs = [Run(changed(preset_name, arm, data, seed, changes), runs_dir) for seed in seeds]
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


def tune(
    datasets: list[str], preset_name: str = "lesson", runs_dir: str = "runs", jobs: int | None = None
) -> pd.DataFrame:
    """Every trial of every tuned arm on every data set, one row each, see `tuning.try_out`; resumes."""
    cells = [
        (dataset, arm, trial, preset_name, runs_dir) for trial in range(TRIALS) for dataset in datasets for arm in TUNED
    ]
    return pd.DataFrame(_in_processes(try_out, cells, jobs or os.cpu_count(), "trials x data sets x arms"))


def sweep(
    datasets: list[str],
    seeds: list[int],
    preset_name: str = "lesson",
    arms: tuple[str, ...] = ARMS,
    runs_dir: str = "runs",
    jobs: int | None = None,
    settings: dict | None = None,
    analyses: bool = True,
) -> dict[str, pd.DataFrame]:
    """Run the grid in several processes, one per core, with a progress bar; it resumes where it was stopped.

    Args:
        datasets, seeds, preset_name, arms, runs_dir, jobs: the grid, and where and how wide it runs.
        settings: changes to the recipe of each arm, see `tuning.choose`; None changes nothing.
        analyses: also make the tables after the first.
    Returns:
        Sorted tables: "low_label" (see `evaluate`), "probing" (see `probe_stages`), "similarity" (see
        `feature_reuse`), "outputs" (see `output_distances`) and "outputs_summary" (see `summarise_outputs`).
    """
    jobs, settings = jobs or os.cpu_count(), settings or {}
    cells = [
        (dataset, arm, seed, preset_name, runs_dir, settings) for seed in seeds for dataset in datasets for arm in arms
    ]
    parts = _in_processes(judge_cell, cells, jobs, "arms x data sets x seeds")
    if analyses:
        parts += _in_processes(analyse_cell, cells, jobs, "analyses")
        tuned = [arm for arm in arms if arm != "random"]
        cells = [(dataset, arm, seeds, preset_name, runs_dir, settings) for dataset in datasets for arm in tuned]
        parts += _in_processes(summarise_outputs, cells, jobs, "distances over seeds")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _ordered(pd.concat([part[name] for part in parts if name in part])) for name in names}


def _in_processes(function, cells: list[tuple], jobs: int, title: str) -> list:
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


def status(
    datasets: list[str], seeds: list[int], preset_name: str, arms: tuple[str, ...], runs_dir: str, settings: dict
) -> str:
    """One line: how many pretrainings of the grid stand on disk, and when the rest may be done at the pace so far."""
    runs = [
        Run(changed(preset_name, arm, data, seed, settings.get(arm, {})), runs_dir)
        for data in map(load, datasets)
        for arm, seed in itertools.product(arms, seeds)
    ]
    ends = sorted(run.encoder_file.stat().st_mtime for run in runs if run.finished)
    text = f"{len(ends)} of {len(runs)} runs are trained"
    if len(ends) < 2 or len(ends) == len(runs):
        return text
    minutes = (ends[-1] - ends[0]) / (len(ends) - 1) * (len(runs) - len(ends)) / 60
    return f"{text}; the rest takes about {minutes:.0f} minutes at the pace so far"


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write each table as `folder/NAME.csv`, atomically, four digits after the point."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        text = functools.partial(table.to_csv, index=False, float_format="%.4f")
        atomic_write(folder / f"{name}.csv", text)
