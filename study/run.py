"""Tune, train and judge: the jobs of the study, in parallel, each resumed where it was stopped."""

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mocolayers.data.labels import label_subset, subset_seed
from mocolayers.data.prepared import MedicalImages, data_folder, load
from mocolayers.evaluation.distributions import output_distances
from mocolayers.evaluation.features import STAGES, stage_features
from mocolayers.evaluation.judge import judge_all
from mocolayers.evaluation.probes import best_probe
from mocolayers.evaluation.similarity import feature_reuse
from mocolayers.recipe import EVALUATIONS, Evaluation, Recipe, preset
from mocolayers.runtime import atomic_write, load_plugin
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run
from study import protocol


@dataclass(frozen=True)
class Cell:
    """One run of the study: which arm, on what, in which series, with the settings that tuning chose for the arm."""

    dataset: str
    arm: str
    seed: int
    series: str = "first"
    preset_name: str = "lesson"
    runs_dir: Path = Path("runs")
    settings: dict = field(default_factory=dict)
    plugin: Path | None = None

    @property
    def plan(self) -> Evaluation:
        return EVALUATIONS[self.preset_name]

    def recipe(self, data: MedicalImages) -> Recipe:
        """In fp32, since "auto" would mean another arithmetic on another processor."""
        if self.plugin:
            load_plugin(self.plugin)
        series = protocol.SERIES[self.series]
        fields = {"precision": "fp32"} | self.settings | series.changes
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        crop = fields.pop("crop", None)  # a field of the views
        recipe = preset(self.preset_name, self.arm, data, self.seed, **fields)
        views = recipe.views if crop is None else replace(recipe.views, crop=crop)
        return replace(recipe, views=views, steps=recipe.steps * series.longer)

    def trained(self) -> tuple[Run, MedicalImages]:
        """The run, trained if it is not on disk, and its data."""
        data = load(self.dataset)
        return pretrain(self.recipe(data), data, self.runs_dir, progress=False), data

    def __str__(self) -> str:
        return f"{self.dataset} {self.arm} {self.seed}"


def grid(series: str, datasets=None, arms=None, seeds=None, settings: dict | None = None, **about) -> list[Cell]:
    """The cells of a series, or of a part of it, seed by seed; `about` goes to every `Cell`."""
    whole, chosen = protocol.SERIES[series], settings or {}
    cells = itertools.product(seeds or protocol.SEEDS, datasets or whole.datasets, arms or whole.arms)
    return [Cell(name, arm, seed, series, settings=chosen.get(arm, {}), **about) for seed, name, arm in cells]


def in_parallel(function: Callable, jobs: list[tuple], title: str, processes: int = -1) -> list:
    """What a function returns for each job's arguments, in order of completion; one thread a job.

    The first error ends it, with the job's name as a note; jobs that have not begun are dropped.
    """
    calls = (delayed(_alone)(function, job) for job in jobs)
    done = Parallel(processes, return_as="generator_unordered")(calls)
    return list(tqdm(done, title, len(jobs), unit="job"))


def _alone(function: Callable, job: tuple):
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return function(*job)
    except Exception as error:
        error.add_note(f"in the job {' '.join(map(str, job))}")
        raise


def judge_cell(cell: Cell, analyses: bool = True) -> dict[str, pd.DataFrame]:
    """Pretrain and judge one arm on one data set from one seed: its part of the tables of `sweep`.

    Encoders of a data set in `protocol.OUTSIDE` are also judged by linear evaluation on the other one, if it is there.
    """
    run, data = cell.trained()
    plan, arm, analyses = cell.plan, cell.arm, analyses and protocol.SERIES[cell.series].analyses
    scores = [judge_all(run, data, plan, stages=STAGES if analyses else (4,), fine_tunings=protocol.FINE_TUNINGS)]
    outside = protocol.OUTSIDE.get(cell.dataset)
    if outside and arm != "supervised" and (data_folder() / outside).is_dir():
        scores.append(judge_all(run, load(outside), plan, ("linear",)))
    if analyses and arm == "random":
        scores.append(judge_all(run, data, plan, ("linear",), source="pixels"))
    tables = {"scores": scores}
    if analyses and arm != "random":  # to fine-tune it is to train "supervised"
        *few, every = plan.fractions
        draws = itertools.product(few, range(protocol.FINE_TUNINGS))
        tables["similarity"] = [feature_reuse(run, data, plan, fraction) for fraction in (few[0], every)]
        tables["outputs"] = [output_distances(run, data, plan, *draw) for draw in draws]
    found = {name: pd.concat(parts).assign(series=cell.series) for name, parts in tables.items()}
    return {name: table if "judged_on" in table else table.assign(judged_on=data.name) for name, table in found.items()}


def sweep(cells: list[Cell], processes: int = -1, analyses: bool = True) -> dict[str, pd.DataFrame]:
    """Run cells in parallel: the table "scores" and, in series that are analysed, "similarity" and "outputs"."""
    parts = in_parallel(judge_cell, [(cell, analyses) for cell in cells], "arms x data sets x seeds", processes)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pd.concat([part[name] for part in parts if name in part]) for name in names}


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write each table as `folder/NAME.csv`, sorted, atomically, five digits after the point.

    Raises:
        ValueError: the folder has a table with rows that this one lacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        keys = [key for key in protocol.KEYS if key in table]
        if (folder / f"{name}.csv").is_file() and (lost := _lacking(pd.read_csv(folder / f"{name}.csv"), table, keys)):
            raise ValueError(f"{folder / name}.csv has {lost} rows that this run does not make; choose another --out")
        table = table[keys + [column for column in table if column not in keys]].sort_values(keys, kind="stable")
        write = functools.partial(table.to_csv, index=False, float_format="%.5f")
        atomic_write(folder / f"{name}.csv", write)


def _lacking(old: pd.DataFrame, new: pd.DataFrame, keys: list[str]) -> int:
    """How many rows of an old table have no row with the same keys in a new one."""
    if not set(keys) <= set(old):
        return len(old)
    known = set(new[keys].astype(str).itertuples(index=False, name=None))
    return sum(row not in known for row in old[keys].astype(str).itertuples(index=False, name=None))


def run_again(cells: list[Cell], count: int, scores: pd.DataFrame, processes: int = -1) -> pd.DataFrame:
    """Train and judge at most `count` of the cells, at random: `again`, beside the `auc` of each row of a table.

    Raises:
        ValueError: the table has no row of a cell; nothing is trained then.
    """
    cells = [cells[place] for place in sorted(np.random.default_rng(0).permutation(len(cells))[:count])]
    known = set(scores[["series", "dataset", "arm", "seed"]].itertuples(index=False, name=None))
    if missing := [str(cell) for cell in cells if (cell.series, cell.dataset, cell.arm, cell.seed) not in known]:
        raise ValueError(f"the table has no rows of {', '.join(missing)}; choose among its data sets, arms and seeds")
    found = sweep(cells, processes, analyses=False)["scores"]
    keys = [key for key in protocol.KEYS if key in found]
    return scores[[*keys, "auc"]].merge(found.rename(columns={"auc": "again"})[[*keys, "again"]], on=keys)


def trials(arm: str) -> list[dict]:
    """The settings of each trial of an arm, the same at every call; the first trial changes nothing."""
    shared, own = np.random.default_rng((protocol.TUNING_SEED, 0)), np.random.default_rng((protocol.TUNING_SEED, 1))
    values = [dict(zip(protocol.SHARED, each, strict=True)) for each in itertools.product(*protocol.SHARED.values())]
    found = [values[number] for number in shared.permutation(len(values))[: protocol.TRIALS - 1]]
    for trial in found if arm in protocol.WEIGHTS else []:
        weight = float(np.exp(own.uniform(*np.log(protocol.WEIGHTS[arm]))))
        stages = protocol.STAGES_ON[own.integers(len(protocol.STAGES_ON))]
        trial["stage_weights"] = [round(weight, 4) * on for on in stages]
        if arm in protocol.WARM_UP:
            trial["stage_warmup"] = protocol.WARM_UP[arm][own.integers(2)]
    return [{}, *found]


def try_out(cell: Cell, trial: int) -> dict:
    """Pretrain a trial and judge it on validation: mean AUC of linear evaluation at the smallest label fraction."""
    data = load(cell.dataset).without_test()
    run = pretrain(cell.recipe(data), data, cell.runs_dir, progress=False)
    encoder = run.load_encoder()
    # Not `run_features`: what that keeps on disk has the test split, too.
    features = {split: stage_features(encoder, data, data.rows(split))[-1] for split in ("train", "val")}
    seeds = [subset_seed(cell.seed, number) for number in range(protocol.TUNING_SUBSETS)]
    rows = [label_subset(data, cell.plan.fractions[0], seed) for seed in seeds]
    auc = np.mean([best_probe(features, data, labelled, cell.plan)[1] for labelled in rows])
    about = {"arm": cell.arm, "dataset": cell.dataset, "trial": trial, "validation_auc": auc}
    return about | {"changes": json.dumps(cell.settings), "recipe": run.recipe.key}


def tune(datasets: tuple[str, ...], processes: int = -1, **about) -> pd.DataFrame:
    """Every trial of every tuned arm on every data set, one row each; `about` goes to every `Cell`."""
    seed, names = protocol.TUNING_SEED, itertools.product(range(protocol.TRIALS), datasets, protocol.TUNED)
    jobs = [(Cell(name, arm, seed, settings=trials(arm)[trial], **about), trial) for trial, name, arm in names]
    return pd.DataFrame(in_parallel(try_out, jobs, "trials x data sets x arms", processes))


def chosen(folder: Path) -> dict[str, dict]:
    """The settings of each arm's best trial in `folder/tuning.csv`: the best mean of validation AUCs over data sets.

    Raises:
        ValueError: there is no such file.
    """
    file = folder / "tuning.csv"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: name a folder that `python -m study tune` has written to")
    found = {}
    for arm, part in pd.read_csv(file).groupby("arm"):
        best = part.groupby("trial")["validation_auc"].mean().idxmax()
        found[arm] = json.loads(part.loc[part["trial"] == best, "changes"].iloc[0])
    return found | {arm: found["moco"] for arm in protocol.AS_MOCO if "moco" in found}
