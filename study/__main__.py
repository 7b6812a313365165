"""The study: tune, train and judge every arm, and say what came out.

examples:
  make study                            # tune, run, report: the whole, resumed where it was stopped
  python -m study run --preset smoke --dataset retina --seed 10 --out rehearsal
  python -m study run --series larger --arm moco mse
  python -m study report --tables rehearsal
  python -m study again --dataset retina --arm moco --seed 10 --series first
  python -m study as-released --dataset breast_histology --seed 10 11 12 --arm mse barlow
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mocolayers.__main__ import run_command
from mocolayers.runtime import atomic_write, writing
from study import protocol


@dataclass
class Part:
    """Which part of the study, and where; the whole by default."""

    dataset: tuple[str, ...] = ()
    """Prepared data sets."""
    arm: tuple[str, ...] = ()
    """Arms."""
    seed: tuple[int, ...] = ()
    """Seeds."""
    series: tuple[Literal["first", "long", "larger"], ...] = ("first", "long")
    """Grids of the protocol; larger needs a data folder of its own, see PROTOCOL.md."""
    preset: Literal["smoke", "lesson", "paper", "paper-sound"] = "lesson"
    """Size of the runs."""
    settings: Path = protocol.TABLES
    """Folder whose tuning.csv decides how each arm is trained."""
    plugin: Path | None = None
    """Python file that adds arms of your own, see CONTRIBUTING.md."""
    runs_dir: Path = Path("runs")
    """Folder that keeps runs."""
    out: Path = Path("runs/study")
    """Folder for tables."""
    jobs: int = -1
    """Processes; one per core by default."""

    @property
    def about(self) -> dict:
        if self.out.resolve() == protocol.TABLES:
            raise ValueError(f"{self.out} holds the committed tables: write elsewhere (--out FOLDER), look, then copy")
        if self.jobs == 0:
            raise ValueError("--jobs 0: give how many processes may run at once, or -1 for one per core")
        return {"preset_name": self.preset, "runs_dir": self.runs_dir, "plugin": self.plugin}

    def cells(self) -> list:
        from study.run import chosen, grid

        with readable(self.settings / "tuning.csv", "tune"):
            settings = chosen(self.settings)
            if not settings:
                raise ValueError("no rows")
        part = self.dataset, self.arm, self.seed, settings
        return [cell for series in self.series for cell in grid(series, *part, **self.about)]

    def write(self, **tables) -> None:
        from study.run import write_tables

        with writing(self.out):
            write_tables(tables, self.out)
        print(f"{', '.join(tables)}: written to {self.out}")


@contextlib.contextmanager
def readable(file: Path, command: str):
    """Turn whatever a table that is there but is not ours leads to into one line."""
    try:
        yield
    except Exception as error:
        if not file.is_file():
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = f"move it away, and make it again: python -m study {command} --out {file.parent}"
        raise ValueError(f"{file} is damaged, or of another program ({why}); {remedy}") from error


Options = tyro.conf.OmitArgPrefixes[Part]


def tune(part: Options) -> None:
    """Try the same settings for every arm, judged on validation; writes tuning.csv."""
    from study.run import tune

    part.write(tuning=tune(part.dataset or protocol.TUNED_ON, part.jobs, **part.about))


def run(part: Options) -> None:
    """Train and judge every arm on every data set from every seed; writes scores.csv, similarity.csv, outputs.csv."""
    from study.run import sweep

    part.write(**sweep(part.cells(), part.jobs))


def report(tables: Path = protocol.TABLES) -> None:
    """Say what the tables of a folder tell, and draw their figure; of the committed ones also into README.md."""
    from study import figures
    from study.report import findings, read, write_readme

    file, picture = tables / "scores.csv", tables / protocol.FIGURE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: `python -m study run --out {tables}` makes it")
    with readable(file, "run"):
        scores = read("scores", folder=tables)
        figure, said = figures.gains(scores), findings(scores)
    with writing(picture):
        atomic_write(picture, lambda path: figure.savefig(path, format="png", dpi=110))
    print(said)
    if tables.resolve() == protocol.TABLES:
        write_readme()


def again(part: Options, cells: int = 24) -> None:
    """Train a random part from nothing, beside the committed table; writes again.csv.

    Args:
        cells: At most so many arms on a data set from a seed, drawn at random.
    """
    from study.report import read, retest
    from study.run import run_again

    part.runs_dir = part.out / "runs-again"
    table = run_again(part.cells(), cells, read("scores"), part.jobs)
    part.write(again=table)
    print(retest(table, read("scores")).round(4).to_string(index=False))


def status(part: Options) -> None:
    """Count the runs that are trained."""
    from mocolayers.data.prepared import load
    from mocolayers.training.runs import Run

    runs = [Run(cell.recipe(load(cell.dataset)), cell.runs_dir) for cell in part.cells()]
    print(f"{sum(run.finished for run in runs)} of {len(runs)} runs are trained")


def as_released(part: Options) -> None:
    """Do what the released code does beside the sound way, as in the preset; writes as_released.csv."""
    import pandas as pd

    from study.as_released import Setting, control, moved
    from study.run import grid, in_parallel

    cells = grid("first", part.dataset or protocol.CONTROLLED, ("moco",), part.seed or protocol.SEEDS[:4], **part.about)
    jobs = [(Setting(cell, ("moco", *(part.arm or ("mse",)))),) for cell in cells]
    table = pd.concat(in_parallel(control, jobs, "as released and soundly", part.jobs))
    part.write(as_released=table)
    print(moved(table).round(3).to_string(index=False))


def main(words: list[str] | None = None) -> int:
    """Run one command of `python -m study`; returns its exit code."""
    commands = {"tune": tune, "run": run, "report": report, "again": again, "status": status}
    return run_command(commands | {"as-released": as_released}, "python -m study", __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
