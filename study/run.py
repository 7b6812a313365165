"""The grid behind the results: arms x data sets x seeds, pretrained, judged and written to a table."""

import functools
import itertools
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mocolayers.data.prepared import MedicalImages, data_folder, load
from mocolayers.evaluation.distributions import ks_interval, output_distances
from mocolayers.evaluation.features import encode_splits
from mocolayers.evaluation.judge import evaluate, fine_tuned, probe, probe_pixels, probe_stages
from mocolayers.evaluation.similarity import feature_reuse
from mocolayers.recipe import EVALUATIONS, Evaluation
from mocolayers.runtime import atomic_write
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run
from study.tuning import TRIALS, TUNED, changed, try_out

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
    possible = {"random": ("linear",), "supervised": ("finetune",)}.get(run.recipe.arm, ("linear", "finetune"))
    wanted = [mode for mode in possible if modes is None or mode in modes]
    rows = []
    if "linear" in wanted:
        rows += _linear(run, data, plan, "linear").to_dict("records")
    if "finetune" in wanted:
        draws = [(fraction, n) for fraction in plan.fractions for n in range(fine_tunings if fraction < 1 else 1)]
        rows += [evaluate(run, data, "finetune", fraction, n, plan, device) for fraction, n in draws]
    return rows


def _linear(run: Run, data: MedicalImages, plan: Evaluation, mode: str) -> pd.DataFrame:
    # Encoded once for all linear evaluations, and not at all if every result is on disk.
    features = functools.cache(lambda: encode_splits(run.load_encoder(), data))
    return probe(run, data, plan, mode, features, plan.fractions)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        dataset, arm, seed, preset_name: which run.
        runs_dir: where it is kept.
        changes: to the recipe of the arm, see `tuning.choose`.
    """

    dataset: str
    arm: str
    seed: int
    preset_name: str = "lesson"
    runs_dir: str | Path = "runs"
    changes: dict = field(default_factory=dict)

    @property
    def plan(self) -> Evaluation:
        return EVALUATIONS[self.preset_name]

    def run(self, data: MedicalImages) -> Run:
        """The run, trained or not."""
        return Run(changed(self.preset_name, self.arm, data, self.seed, self.changes), self.runs_dir)

    def trained(self) -> tuple[Run, MedicalImages]:
        """The run, trained if it is not on disk, and its data."""
        data = load(self.dataset)
        return pretrain(self.run(data).recipe, data, self.runs_dir, progress=False), data

    def __str__(self) -> str:
        return f"{self.dataset} {self.arm} {self.seed}"


def grid(
    datasets: list[str], arms: list[str], seeds: list[int], settings: dict | None = None, **about: str | Path
) -> list[Cell]:
    """The cells of data sets x arms x seeds; `settings` are the changes per arm, `about` goes to every `Cell`."""
    settings = settings or {}
    return [
        Cell(dataset, arm, seed, changes=settings.get(arm, {}), **about)
        for seed, dataset, arm in itertools.product(seeds, datasets, arms)
    ]


def judge_cell(cell: Cell) -> dict[str, pd.DataFrame]:
    """Pretrain and judge one arm on one data set from one seed; what is on disk is not done again.

    Encoders of a data set in `OUTSIDE` are also judged by linear evaluation on the other one, if it is prepared.

    Returns:
        The cell's part of the table "low_label".
    """
    run, data = cell.trained()
    rows = judge(run, data, cell.plan, fine_tunings=FINE_TUNED_SUBSETS)
    outside = OUTSIDE.get(cell.dataset)
    if outside and cell.arm != "supervised" and (data_folder() / outside).is_dir():
        rows += judge_outside(run, load(outside), cell.plan)
    return {"low_label": pd.DataFrame(rows)}


def judge_outside(run: Run, data: MedicalImages, plan: Evaluation) -> list[dict]:
    """Linear evaluation of a run on a data set that it was not trained on; its rows bear that data set's name."""
    table = _linear(run, data, plan, f"on-{data.name}")
    return table.assign(dataset=data.name, mode="linear").to_dict("records")


def analyse_cell(cell: Cell) -> dict[str, pd.DataFrame]:
    """The analyses of one cell: parts of the tables "probing", "similarity" and "outputs" of `sweep`."""
    run, data = cell.trained()
    plan, tables = cell.plan, {}
    if cell.arm != "supervised":  # before fine-tuning its encoder is the random one
        probes = [probe_stages(run, data, plan)] + ([probe_pixels(run, data, plan)] if cell.arm == "random" else [])
        tables["probing"] = pd.concat(probes)
    if cell.arm != "random":  # fine-tuning it is "supervised"
        few, every = plan.fractions[:-1], plan.fractions[-1]
        tables["similarity"] = pd.concat([feature_reuse(run, data, plan, f) for f in (few[0], every)])
        draws = itertools.product(few, range(FINE_TUNED_SUBSETS))
        tables["outputs"] = pd.concat([output_distances(run, data, plan, f, subset) for f, subset in draws])
    return tables


def summarise_outputs(*cells: Cell) -> dict[str, pd.DataFrame]:
    """KS distance of few labels to all labels over every seed and subset of an arm, beside the floor between seeds.

    Args:
        cells: the seeds of one arm on one data set.
    """
    data, plan = load(cells[0].dataset), cells[0].plan
    patients = data.patients[data.rows("test")]
    runs = [cell.run(data) for cell in cells]
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
        about = {"dataset": cells[0].dataset, "arm": cells[0].arm, "models": name}
        rows.append(about | {"ks": mean, "low": low, "high": high, "pairs": len(models)})
    return {"outputs_summary": pd.DataFrame(rows)}


def tune(
    datasets: list[str], preset_name: str = "lesson", runs_dir: str | Path = "runs", jobs: int | None = None
) -> pd.DataFrame:
    """Every trial of every tuned arm on every data set, one row each, see `tuning.try_out`; resumes."""
    trials = itertools.product(range(TRIALS), datasets, TUNED)
    calls = [(dataset, arm, trial, preset_name, runs_dir) for trial, dataset, arm in trials]
    return pd.DataFrame(_in_processes(try_out, calls, jobs, "trials x data sets x arms"))


def sweep(cells: list[Cell], jobs: int | None = None, analyses: bool = True) -> dict[str, pd.DataFrame]:
    """Run a grid in several processes, one per core, with a progress bar; it resumes where it was stopped.

    Args:
        cells: see `grid`.
        jobs: how many processes; one per core by default.
        analyses: also make the tables after the first.
    Returns:
        Sorted tables: "low_label" (see `evaluate`), "probing" (see `probe_stages`), "similarity" (see
        `feature_reuse`), "outputs" (see `output_distances`) and "outputs_summary" (see `summarise_outputs`).
    """
    alone = [(cell,) for cell in cells]
    parts = _in_processes(judge_cell, alone, jobs, "arms x data sets x seeds")
    if analyses:
        parts += _in_processes(analyse_cell, alone, jobs, "analyses")
        by_arm: dict[tuple, list[Cell]] = {}
        for cell in cells:
            if cell.arm != "random":
                by_arm.setdefault((cell.dataset, cell.arm), []).append(cell)
        parts += _in_processes(summarise_outputs, list(by_arm.values()), jobs, "distances over seeds")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _ordered(pd.concat([part[name] for part in parts if name in part])) for name in names}


def _in_processes(function, calls: list[tuple], jobs: int | None, title: str) -> list:
    """Call a function with every tuple of arguments, in processes that share the cores; in order of completion."""
    jobs = jobs or os.cpu_count()
    found, threads = [], max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_with_threads, threads, function, call) for call in calls]
        try:
            for done in tqdm(as_completed(waiting), title, len(calls), unit="cell"):
                found.append(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or all that waits would be done before the error is seen
            raise
    return found


def _with_threads(threads: int, function, call: tuple):
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        return function(*call)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    first = [name for name in COLUMNS if name in table]
    table = table[first + [name for name in table if name not in first]]
    order = [name for name in ORDER if name in table]
    return table.sort_values(order, ignore_index=True, kind="stable")


def status(cells: list[Cell]) -> str:
    """One line: how many pretrainings of a grid stand on disk, and when the rest may be done at the pace so far."""
    data = {name: load(name) for name in {cell.dataset for cell in cells}}
    runs = [cell.run(data[cell.dataset]) for cell in cells]
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
