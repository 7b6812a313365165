"""The study: train and judge every arm, and say what came out.

examples:
  make study                                       # the whole, resumed where it was stopped
  make study SCALE=smoke                           # a rehearsal, in minutes
  python -m study run --series gate                # only the first of its series
  python -m study run --dataset mine --out runs/study/mine
  python -m study run --scheduler tcp://10.0.0.1:8786       # on a Dask cluster that shares these folders
  python -m study report --out runs/study/cpu
  python -m study again --series comparison --dataset aptos --arm moco --seed 3
  python -m study as-released --dataset breast_histology --seed 10 11 12 --arm mse barlow
"""

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import tyro

from mocolayers.__main__ import run_command
from study import protocol


@dataclass
class Part:
    """Which part of the study, and where; the whole by default."""

    series: tuple[Literal["gate", "weights", "comparison", "conditions"], ...] = tuple(protocol.SERIES)
    """In this order: a later one follows from the tables of the earlier ones."""
    dataset: tuple[str, ...] = ()
    """Prepared data sets; those of the protocol that are there by default."""
    arm: tuple[str, ...] = ()
    """Arms, of the comparison and the weights."""
    seed: tuple[int, ...] = ()
    """Seeds."""
    scale: Literal["smoke", "cpu", "gpu"] = "cpu"
    """Size of every run."""
    plugin: Path | None = None
    """Python file that adds arms of your own, see CONTRIBUTING.md."""
    runs_dir: Path = Path("runs")
    """Folder that keeps runs."""
    out: Path | None = None
    """Folder of tables; rows that it has are not made again. runs/study/SCALE by default."""
    jobs: int | None = None
    """Processes; one per core by default, and one where there is a GPU."""
    scheduler: str = ""
    """Address of a Dask cluster that does the work instead of this machine."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/study") / self.scale

    @property
    def about(self) -> dict:
        if self.jobs == 0:
            raise ValueError("--jobs 0: give how many processes may run at once, or -1 for one per core")
        where = {"scale": self.scale, "runs_dir": self.runs_dir.resolve(), "plugin": self.plugin}
        return where | {"datasets": self.dataset, "arms": self.arm, "seeds": self.seed}


Options = tyro.conf.OmitArgPrefixes[Part]


def run(part: Options) -> None:
    """Train and judge what the tables lack, and add it to them one by one."""
    from study.run import carry_out

    for series in part.series:
        print(f"{series}: {protocol.SERIES[series]}", flush=True)
        carry_out(series, part.folder, part.jobs, part.scheduler, **part.about)
    print(f"the tables are in {part.folder}")


def report(out: Path = protocol.TABLES) -> None:
    """Say what the tables of a folder tell, and draw their figure; of the committed ones also into both README.md."""
    from mocolayers.training.runs import write_file
    from study import figures
    from study.report import findings, gate, page, read, write_readme

    scores = read("scores", folder=out)
    if scores.empty or gate(scores).empty:
        lack = "has no whole seed of the gate" if len(scores) else "does not exist"
        raise ValueError(f"{out / 'scores.csv'} {lack}: `python -m study run --out {out}` makes it")
    figure, picture = figures.gains(scores), out / protocol.FIGURE
    write_file(picture, lambda path: figure.savefig(path, format="png", dpi=110))
    print(findings(scores))
    if out.resolve() == protocol.TABLES:
        write_file(protocol.PAGE, lambda path: path.write_text(page(), encoding="utf-8"))
        write_readme()


def again(part: Options, cells: int = 3, tables: Path = protocol.TABLES) -> None:
    """Train a random part of a table from nothing, beside what the table says; adds to again.csv in --out.

    Args:
        cells: At most so many arms on a data set from a seed, drawn at random.
        tables: Folder of the table.
    """
    from study.report import labelled, retest, usual
    from study.run import keep, planned, run_again, scores_in

    part.runs_dir = part.runs_dir / f"again-{datetime.now():%Y%m%d-%H%M%S}"  # new, so nothing is taken from the cache
    scores = scores_in(tables)
    chosen = [cell for series in part.series for cell in planned(series, scores, **part.about)]
    table = run_again(chosen, cells, scores, part.jobs, part.scheduler)
    keep({"again": table}, part.folder)
    for series in table["series"].unique():
        both = (usual(labelled(rows), series) for rows in (table, scores))
        print(f"{series}\n{retest(*both).round(4).to_string(index=False)}")


def as_released(part: Options) -> None:
    """Do what the released code does beside the sound way, with the preset's views; adds to as_released.csv."""
    import pandas as pd

    from study.as_released import Setting, control, moved
    from study.run import Cell, in_parallel, keep

    seeds, datasets = part.seed or protocol.REPETITIONS[:4], part.dataset or protocol.CONTROLLED
    about = {"scale": part.scale, "runs_dir": part.runs_dir, "plugin": part.plugin}
    cells = [Cell("conditions", name, "moco", seed, **about) for seed in seeds for name in datasets]
    jobs = [Setting(cell, ("moco", *(part.arm or ("mse",)))) for cell in cells]
    tables = []
    for table in in_parallel(control, jobs, "as released and soundly", part.jobs, part.scheduler):
        keep({"as_released": table}, part.folder)
        tables.append(table)
    print(moved(pd.concat(tables)).round(3).to_string(index=False))


def main(words: list[str] | None = None) -> int:
    """Run one command of `python -m study`; returns its exit code."""
    commands = {"run": run, "report": report, "again": again, "as-released": as_released}
    return run_command(commands, "python -m study", __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
