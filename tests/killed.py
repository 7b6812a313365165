"""Kill work with SIGKILL at random moments, let the same call go on, and compare with work that was never killed.

python tests/killed.py pretraining|fine_tuning|series COUNT     on Linux and macOS; prints how many ended the same

All data are synthetic. Work runs in forks of this process, so that a kill hits the work and not the start of Python.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import make_arrays, make_card
from safetensors.torch import load_file
from test_series import printed, write_notebook

from mocolayers.data.prepared import load, save_prepared
from mocolayers.evaluation.judge import judge
from mocolayers.notebook import series
from mocolayers.recipe import Evaluation, preset
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run

SMALL = {"batch": 16, "queue": 40, "log_every": 2, "monitor_every": 5, "steps": 60}
PLAN = Evaluation(least_steps=60, batch=16, checks=4, resamples=20)
CELL = f"""
from mocolayers.data.prepared import load
from mocolayers.recipe import preset
from mocolayers.training.pretrain import pretrain
data = load(DATASET)
run = pretrain(preset(PRESET, "moco", data, SEED, **{SMALL}), data, RUNS_DIR, "cpu", progress=False)
print(run.weights_hash)
"""


class Pretraining:
    def __init__(self, home: Path) -> None:
        self.data = load("tiny", home / "data")
        self.recipe = preset("smoke", "barlow-conditioned", self.data, 1, **SMALL)

    def work(self, folder: Path) -> None:
        pretrain(self.recipe, self.data, folder, "cpu", progress=False)

    def outcome(self, folder: Path) -> list:
        run = Run(self.recipe, folder)
        return [run.encoder_file.read_bytes(), run.history_file.read_bytes()]


class FineTuning(Pretraining):
    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.trained = home / "trained"
        assert ends_well(forked(super().work, self.trained))

    def work(self, folder: Path) -> None:
        shutil.copytree(self.trained, folder, dirs_exist_ok=True)
        judge(Run(self.recipe, folder), self.data, PLAN, 0.5, protocol="finetune", device="cpu")

    def outcome(self, folder: Path) -> list:
        [kept] = folder.glob("*/evaluations/[!.]*")
        return [kept.name, *(tensor.numpy().tobytes() for _, tensor in sorted(load_file(kept).items()))]


class Series:
    def __init__(self, home: Path) -> None:
        write_notebook(home / "notebooks", "01_trains", CELL)
        write_notebook(home / "notebooks", "02_more", "print(sum(range(10**7)))")
        series.NOTEBOOKS = home / "notebooks"
        os.environ["MOCOLAYERS_DATA"] = str(home / "data")

    def work(self, folder: Path) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        assert series.run_series(["tiny"], ["smoke"], runs_dir=folder / "runs", out=folder, jobs=1) == 0

    def outcome(self, folder: Path) -> list:
        pages = sorted(folder.glob("tiny/smoke/seed0/*.ipynb"))
        [encoder] = folder.glob("runs/*/encoder.safetensors")
        return [encoder.read_bytes(), *((page.name, printed(page).splitlines()[-1]) for page in pages)]


KINDS = {"pretraining": Pretraining, "fine_tuning": FineTuning, "series": Series}


def forked(work, folder: Path) -> int:
    """Start `work(folder)` in a process of its own; returns its number."""
    if process := os.fork():
        return process
    work(folder)
    os._exit(0)


def ends_well(process: int) -> bool:
    return os.waitpid(process, 0)[1] == 0


def same_after_a_kill(kind, folder: Path, wanted: list, delay: float) -> bool | None:
    """Whether work that is killed after so many seconds ends as wanted; None if it ended before."""
    process = forked(kind.work, folder)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    if ends_well(process):
        return None
    return ends_well(forked(kind.work, folder)) and kind.outcome(folder) == wanted


def main(name: str, count: int) -> int:
    torch.set_num_threads(1)
    rng, found = random.Random(), []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        save_prepared(home / "data" / "tiny", make_arrays(), make_card())
        kind, started = KINDS[name](home), time.monotonic()
        assert ends_well(forked(kind.work, home / "straight"))
        seconds, wanted, number = time.monotonic() - started, kind.outcome(home / "straight"), 0
        while len(found) < count:
            number += 1
            delay = rng.uniform(0, seconds)
            same = same_after_a_kill(kind, home / str(number), wanted, delay)
            found += [] if same is None else [same]
            if same is False:
                print(f"another outcome after a kill at {delay:.3f} of {seconds:.3f} s")
    print(f"{name}: {sum(found)} of {count} ended the same")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
