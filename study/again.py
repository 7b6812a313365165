"""A random part of the results, trained again from nothing: how far do two runs of one protocol lie apart?

Another number of threads, another processor, or code that sums in another order rounds differently, and training
amplifies that. What is left of a difference between arms must be read against this.
"""

import numpy as np
import pandas as pd

from study.report import by_seed, interval
from study.run import Cell, sweep

ROW = ["dataset", "arm", "mode", "fraction", "seed", "subset"]


def draw(cells: list[Cell], count: int, seed: int = 0) -> list[Cell]:
    """So many cells of a grid, drawn at random without replacement."""
    order = np.random.default_rng(seed).permutation(len(cells))
    return [cells[place] for place in sorted(order[:count])]


def run_again(cells: list[Cell], committed: pd.DataFrame, jobs: int | None = None) -> pd.DataFrame:
    """Train and judge cells, and put every row beside the committed one.

    Args:
        cells: their `runs_dir` decides what is trained; in an empty one that is all.
        committed: a table "low_label" of `sweep`.
        jobs: see `sweep`.
    Returns:
        The columns `ROW`, auc as committed, and again.
    Raises:
        ValueError: before anything is trained, if a cell has no row in the table.
    """
    known = set(committed[["dataset", "arm", "seed"]].itertuples(index=False, name=None))
    if missing := [str(cell) for cell in cells if (cell.dataset, cell.arm, cell.seed) not in known]:
        raise ValueError(f"the table has no rows of {', '.join(missing)}; choose among its data sets, arms and seeds")
    found = sweep(cells, jobs, analyses=False)["low_label"]
    return committed[[*ROW, "auc"]].merge(found[[*ROW, "auc"]].rename(columns={"auc": "again"}), on=ROW)


def apart(table: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """How far the two runs lie apart, beside how far seeds do.

    Args:
        table: of `run_again`.
        committed: the table that it was made with.
    Returns:
        One row per mode and fraction: `runs`; the mean difference of a run's AUC, averaged over label subsets, with its
        95% Student-t interval over runs; the mean size of that difference; and `seeds`, the mean size of the difference
        between two seeds of one arm and data set, in the committed table.
    """
    run = ["mode", "fraction", "dataset", "arm", "seed"]
    once, twice, every = (
        by_seed(rows).set_index(run)["auc"].sort_index()
        for rows in (table, table.assign(auc=table["again"]), committed)
    )
    rows = []
    for key, moved in (twice - once).groupby(["mode", "fraction"], sort=False):
        low, high = interval(moved)
        wide = every.loc[key].unstack("seed").to_numpy()
        first, second = np.triu_indices(wide.shape[1], 1)
        row = {"mode": key[0], "fraction": key[1], "runs": len(moved), "difference": moved.mean()}
        row |= {"low": low, "high": high, "size": moved.abs().mean()}
        rows.append(row | {"seeds": np.nanmean(np.abs(wide[:, first] - wide[:, second]))})
    return pd.DataFrame(rows)
