"""Train and judge: the jobs of the study, in parallel, each written into the tables as soon as it is done."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed, parallel_config
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mocolayers.data.prepared import PHANTOMS, TEST, TRAIN, UNLABELLED, VAL, MedicalImages, data_folder, load
from mocolayers.evaluation.distributions import output_distances
from mocolayers.evaluation.features import STAGES
from mocolayers.evaluation.judge import judge_all
from mocolayers.evaluation.similarity import feature_reuse
from mocolayers.recipe import ARMS, Evaluation, Recipe, preset
from mocolayers.runtime import held, load_plugin, writing
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run, write_file
from study import protocol
from study.report import best_weights, setting_of, table_in

NAMED = ("scale", "series", "dataset", "setting", "arm", "weight", "seed")  # one cell


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        series: a key of `protocol.SERIES`.
        dataset, arm, seed: what is trained; the seed also draws the split, see `draw`.
        setting: a key of `protocol.CANDIDATES`, or "released": what all arms share.
        weight: the arm's stage weights are multiplied by it.
        scale: a key of `protocol.SCALES`.
        runs_dir: folder that keeps runs.
        plugin: Python file that adds arms.
        changes: more fields of the recipe.
    """

    series: str
    dataset: str
    arm: str
    seed: int
    setting: str = "preset"
    weight: float = 1.0
    scale: str = "cpu"
    runs_dir: Path = Path("runs")
    plugin: Path | None = None
    changes: dict = field(default_factory=dict, hash=False)

    @property
    def plan(self) -> Evaluation:
        return protocol.SCALES[self.scale].plan

    def recipe(self, data: MedicalImages) -> Recipe:
        """The recipe of the scale, the setting, the weight and the changes."""
        if self.plugin:
            load_plugin(self.plugin)
        scale, released = protocol.SCALES[self.scale], self.setting == "released"
        shared = protocol.released_changes(data.modality, self.arm) if released else protocol.CANDIDATES[self.setting]
        fields = scale.fields | shared | self.changes
        views, longer = fields.pop("views", {}), fields.pop("longer", 1)
        recipe = preset(scale.preset, self.arm, data, self.seed, **fields)
        if data.channels == 1:  # their colour stays off, as in every preset
            views = {name: value for name, value in views.items() if name not in ("saturation", "hue", "gray")}
        weights = tuple(self.weight * weight for weight in recipe.stage_weights)
        views = replace(recipe.views, **views)
        return replace(recipe, steps=round(recipe.steps * longer), stage_weights=weights, views=views)

    def trained(self) -> tuple[Run, MedicalImages]:
        """The run, trained if it is not on disk, and its data."""
        data = draw(load(self.dataset), self.seed)
        return pretrain(self.recipe(data), data, self.runs_dir, progress=False), data

    def __str__(self) -> str:
        return " ".join(str(getattr(self, column)) for column in NAMED)


def draw(data: MedicalImages, seed: int) -> MedicalImages:
    """The same images with a split of their own, by patient and near the class mix.

    Patients of two of ten folds are the same for every seed. The seeds of `protocol.TUNING` are judged on them; other
    seeds train on them, and test two folds of the rest. One more fold validates. Unlabelled images stay what they are,
    and patients who have some are trained on.
    """
    split, without = data.split.copy(), data.split == UNLABELLED
    split[~without] = TRAIN
    labelled = np.flatnonzero(~np.isin(data.patients, data.patients[without]))
    labels = data.labels[labelled]
    classes, patients = labels.any(axis=1) if labels.ndim == 2 else labels, data.patients[labelled]
    apart = _fold(classes, patients, protocol.FOLDS // protocol.TEST_FOLDS, seed=0) == 0
    fold = _fold(classes[~apart], patients[~apart], protocol.FOLDS - protocol.TEST_FOLDS, seed)
    tuning = seed in protocol.TUNING
    codes = np.full(len(labelled), TEST if tuning else TRAIN, split.dtype)
    codes[~apart] = np.where(fold == 0, VAL, np.where((fold <= protocol.TEST_FOLDS) & (not tuning), TEST, TRAIN))
    split[labelled] = codes
    return data.with_split(split)


def _fold(classes: np.ndarray, patients: np.ndarray, count: int, seed: int) -> np.ndarray:
    """For each image the number of its fold; whole patients, each fold near the class mix."""
    found = np.zeros(len(classes), int)
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for number, (_, rows) in enumerate(folds.split(classes, classes, patients)):
        found[rows] = number
    return found


def in_parallel(
    function: Callable, jobs: list, title: str, processes: int | None = None, scheduler: str = ""
) -> Iterator:
    """What a function returns for each job, as they end; one thread a job.

    The first error ends it, with the job's name as a note; jobs that have not begun are dropped.

    Args:
        processes: of this machine; None is one per core, or one where there is a GPU.
        scheduler: address of a Dask cluster that does the work instead; its workers see the same folders.
    """
    with contextlib.ExitStack() as cluster:
        if scheduler:
            from distributed import Client

            cluster.enter_context(Client(scheduler))
            cluster.enter_context(parallel_config("dask"))
        calls = (delayed(_alone)(function, job) for job in jobs)
        many = -1 if scheduler or not torch.cuda.is_available() else 1
        done = Parallel(processes or many, return_as="generator_unordered")(calls)
        yield from tqdm(done, title, len(jobs), unit="job")


def _alone(function: Callable, job):
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return function(job)
    except Exception as error:
        error.add_note(f"in the job {job}")
        raise


def judge_cell(cell: Cell) -> dict[str, pd.DataFrame]:
    """Train and judge one cell: its rows of the tables "scores" and, in the comparison, "similarity" and "outputs".

    Values are means over label subsets. Encoders of a data set in `protocol.OUTSIDE` are also judged by linear
    evaluation on the other one, if it is there.
    """
    run, data = cell.trained()
    plan, arm, analyses = cell.plan, cell.arm, cell.series == "comparison"
    scores = [judge_all(run, data, plan, stages=STAGES if analyses else (4,), fine_tunings=protocol.FINE_TUNINGS)]
    outside = protocol.OUTSIDE.get(cell.dataset)
    if outside and analyses and arm != "supervised" and (data_folder() / outside).is_dir():
        scores.append(judge_all(run, load(outside), plan, ("linear",)))
    if analyses and arm == "random":
        scores.append(judge_all(run, data, plan, ("linear",), source="pixels"))
    tables = {"scores": pd.concat(scores).assign(pull=pull(run))}
    if analyses and arm != "random":  # to fine-tune it is to train "supervised"
        *few, every = plan.fractions
        reuse = [feature_reuse(run, data, plan, fraction) for fraction in (few[0], every)]
        outputs = [output_distances(run, data, plan, f, n) for f in few for n in range(protocol.FINE_TUNINGS)]
        tables |= {"similarity": pd.concat(reuse), "outputs": pd.concat(outputs).query("`class` == 'mean'")}
    about = {name: getattr(cell, name) for name in NAMED}
    return {name: _means(table.assign(**about)) for name, table in tables.items()}


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over label subsets; of words, which are the same in all, the first."""
    if "judged_on" not in table:
        table = table.assign(judged_on=table["dataset"])
    keys = [key for key in protocol.KEYS if key in table and key != "subset"]
    table = table.drop(columns=["subset", "pool"], errors="ignore")
    how = {name: "mean" if pd.api.types.is_numeric_dtype(table[name]) else "first" for name in table}
    return table.groupby(keys, sort=False, as_index=False).agg({name: how[name] for name in table if name not in keys})


def pull(run: Run) -> float:
    """The stage losses' share of the summed gradient norms, mean over the monitored steps; 0 without them."""
    history = run.history()
    return float(1 - history["gradient_info_nce"].mean()) if "gradient_info_nce" in history else 0.0


def keep(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Add rows to `folder/NAME.csv`, sorted, atomically; a row that is there already is replaced."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):  # by one process at a time
        # What is done is told by the scores, so they come last.
        for name in sorted(tables, key="scores".__eq__):
            _keep(tables[name], folder / f"{name}.csv")


def _keep(table: pd.DataFrame, file: Path) -> None:
    table = pd.concat([table_in(file), table]) if file.is_file() else table
    keys = [key for key in protocol.KEYS if key in table]
    table = table[~_names(table, keys).duplicated(keep="last")].sort_values(keys, kind="stable")
    table = table[keys + [column for column in table if column not in keys]]
    write_file(file, functools.partial(table.to_csv, index=False, float_format="%.5f"))


def scores_in(folder: Path) -> pd.DataFrame:
    """The table of scores as it is, or an empty one."""
    file = folder / "scores.csv"
    return table_in(file) if file.is_file() else pd.DataFrame(columns=[*protocol.KEYS, "auc", "pull"])


def missing(cells: list[Cell], scores: pd.DataFrame) -> list[Cell]:
    """The cells that a table has no rows of."""
    known = set(_names(scores, list(NAMED)))
    return [cell for cell in cells if str(cell) not in known]


def _names(table: pd.DataFrame, keys: list[str]) -> pd.Series:
    weight = {"weight": float} if "weight" in keys else {}
    return table[keys].astype(weight).fillna("").astype(str).agg(" ".join, axis=1)


def carry_out(series: str, folder: Path, processes: int | None = None, scheduler: str = "", **part) -> None:
    """Train and judge what a series still lacks in the tables of a folder; its next step may follow from the last.

    Args:
        part: see `planned`.
    """
    scores = scores_in(folder)
    while cells := missing(planned(series, scores, **part), scores):
        for found in in_parallel(judge_cell, cells, series, processes, scheduler):
            keep(found, folder)
        scores = scores_in(folder)


def planned(series: str, scores: pd.DataFrame, datasets=(), arms=(), seeds=(), scale="cpu", **about) -> list[Cell]:
    """The cells of a series, or of a part of it, as far as the table tells; `about` goes to every `Cell`.

    Raises:
        ValueError: the series needs rows of an earlier one, no data set is prepared, or nobody knows an arm.
    """
    size, make = protocol.SCALES[scale], functools.partial(Cell, series, scale=scale, **about)
    datasets, scores = datasets or prepared_sets(scale), scores[scores["scale"] == scale]
    if about.get("plugin"):
        load_plugin(about["plugin"])
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}, and those of a --plugin")
    if series == "gate":
        return _gate(make, scores, datasets, seeds or size.tuning)
    # A choice from half a series would be another one when it is whole.
    if missing(planned("gate", scores, datasets, scale=scale), scores):
        raise ValueError("the series gate is not complete; run it first, with these options and --series gate")
    shared = {name: setting_of(name, scores) for name in datasets}
    if series == "weights":
        tried = {arm: protocol.WEIGHTS.get(arm, (1.0,)) for arm in arms or protocol.WEIGHTS}
        pairs = [("moco", 1.0)] + [(arm, float(w)) for arm, weights in tried.items() for w in weights if arm != "moco"]
        sweeps = (seeds or size.tuning)[: protocol.SWEEPS]
        grid = [(seed, name, *pair) for seed in sweeps for pair in pairs for name in datasets]
        return [make(name, arm, seed, shared[name], weight) for seed, name, arm, weight in grid]
    seeds = seeds or size.repetitions
    if series == "conditions":
        grid = [(seed, name, arm) for seed in seeds for name in datasets for arm in ("moco", "mse", "barlow")]
        return [make(name, arm, seed, "released") for seed, name, arm in grid]
    best = best_weights(scores)
    if lacking := [arm for arm in protocol.LEADING if arm not in best]:
        raise ValueError(
            f"{lacking[0]} has not been tried at all its weights; run python -m study run --series weights"
        )
    pairs = [(arm, 1.0) for arm in protocol.EVERYWHERE]
    pairs = dict.fromkeys([*pairs, *best.items(), *((arm, 1.0) for arm in arms)])
    grid = [(seed, name, *pair) for seed in seeds for name in datasets for pair in pairs if not arms or pair[0] in arms]
    return [make(name, arm, seed, shared[name], weight) for seed, name, arm, weight in grid]


def prepared_sets(scale: str) -> list[str]:
    """The primary data sets that are prepared; a rehearsal without any takes synthetic ones, made on first use.

    Raises:
        ValueError: none is prepared, or one for another task or smaller than the protocol wants it.
    """
    found = [name for name in protocol.PRIMARY if (data_folder() / name).is_dir()]
    for data in map(load, found):
        wanted = "ordinal" if data.name in protocol.GRADED else "binary"
        if scale != "smoke" and (data.task != wanted or data.side < protocol.SMALLEST):
            raise ValueError(
                f"{data.name} is prepared with {data.side} px for a {data.task} task; study/PROTOCOL.md has the "
                f"command for the study's own ({wanted}). To take this one as it is: --dataset {data.name}"
            )
    if found or scale == "smoke":
        return found or list(PHANTOMS)
    raise ValueError(
        f"{data_folder()} has none of {', '.join(protocol.PRIMARY)}: study/PROTOCOL.md has the commands that prepare "
        "them, or name another prepared data set with --dataset"
    )


def _gate(make: Callable, scores: pd.DataFrame, datasets: list[str], seeds: tuple[int, ...]) -> list[Cell]:
    """Every candidate with the first seed; when all are there, the best one with the others."""
    first = [make(name, arm, seeds[0]) for name in datasets for arm in protocol.UNTRAINED]
    first += [make(name, "moco", seeds[0], setting) for setting in protocol.CANDIDATES for name in datasets]
    if missing(first, scores):
        return first
    trios = [(name, arm, "preset") for name in datasets for arm in protocol.UNTRAINED]
    trios += [(name, "moco", setting_of(name, scores)) for name in datasets]
    return first + [make(name, arm, seed, setting) for seed in seeds[1:] for name, arm, setting in trios]


def run_again(cells: list[Cell], count: int, scores: pd.DataFrame, *workers) -> pd.DataFrame:
    """Train and judge at most `count` of the cells of a table, at random: `again`, beside the `auc` of each row.

    `workers` are those of `in_parallel`.

    Raises:
        ValueError: the table has none of them; nothing is trained then.
    """
    absent = missing(cells, scores)
    cells = [cell for cell in cells if cell not in absent]
    if not cells:
        raise ValueError("the table has none of these rows; choose among its data sets, arms and seeds")
    cells = [cells[place] for place in sorted(np.random.default_rng(0).permutation(len(cells))[:count])]
    found = pd.concat(tables["scores"] for tables in in_parallel(judge_cell, cells, "again", *workers))
    keys = [key for key in protocol.KEYS if key in found]
    return scores[[*keys, "auc"]].merge(found.rename(columns={"auc": "again"})[[*keys, "again"]], on=keys)
