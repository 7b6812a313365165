"""MoCo with intermediate-layer losses for medical images: pretrain, judge, and run the notebooks."""

import ast
import functools
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mocolayers.notebook.series import run_series
from mocolayers.recipe import EVALUATIONS, preset
from mocolayers.runtime import DatasetError, RunError, load_plugin


@dataclass
class Job:
    """Which run, and where."""

    dataset: str = "auto"
    """Prepared data set; auto takes a real one that is there, and says which."""
    arm: str = "moco"
    """What is trained: random, supervised, moco, mse, barlow, ... or an arm of --plugin."""
    preset: Literal["smoke", "lesson", "paper"] = "lesson"
    """Size of the run."""
    seed: int = 0
    """Weights, order and views follow from it."""
    set: tuple[str, ...] = ()
    """Fields of the recipe to change: lr=0.03 steps=1000 projector=64."""
    plugin: Path | None = None
    """Python file that adds arms of your own, see CONTRIBUTING.md."""
    init: Path | None = None
    """Start from these weights of a ResNet: .pth or .safetensors."""
    runs_dir: Path = Path("runs")
    """Folder that keeps runs."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """torch.compile what a step computes, of several processes the encoders: for long runs on a GPU."""


def pretrain(job: tyro.conf.OmitArgPrefixes[Job]) -> None:
    """Pretrain one arm on one data set; a killed run goes on where it was. The bar says what the rest will take.

    examples:
      python -m mocolayers pretrain --dataset pneumoniamnist --arm mse
      python -m mocolayers pretrain --dataset nih --arm mse --preset paper
      python -m mocolayers pretrain --dataset nih --arm barlow --seed 3 --set lr=0.03 steps=1000
      torchrun --nproc-per-node 2 -m mocolayers pretrain --dataset nih --arm mse

    Args:
        job: which run.
    """
    from mocolayers.training.distributed import from_first, processes

    with processes(job.device):
        run, _ = _pretrained(job)
        said = f"{run.folder}: {run.recipe.arm} on {run.recipe.dataset}, seed {run.recipe.seed}"
        from_first(functools.partial(print, said, flush=True))


def finetune(
    job: tyro.conf.OmitArgPrefixes[Job],
    protocol: Literal["linear", "finetune"] = "finetune",
    fraction: tuple[float, ...] = (),
    subset: int = 0,
) -> None:
    """Judge an arm with few labels; it is pretrained first if it has not been.

    examples:
      python -m mocolayers finetune --dataset pneumoniamnist --arm mse --fraction 0.01 0.1
      python -m mocolayers finetune --dataset pneumoniamnist --arm mse --protocol linear
      torchrun --nproc-per-node 2 -m mocolayers finetune --dataset nih --arm mse --fraction 0.01

    Args:
        job: which run.
        protocol: Train the whole network, or a logistic regression on its features.
        fraction: Label fractions in (0, 1]; default: the preset's.
        subset: Number of the label subset within the seed.
    """
    from mocolayers.evaluation.judge import judge
    from mocolayers.method.collectives import own_part
    from mocolayers.training.distributed import from_first, processes

    if subset < 0 or not all(0 < share <= 1 for share in fraction):  # known before a long pretraining
        raise ValueError("--subset is a number from 0 up, and --fraction in (0, 1], such as 0.01 for 1% of the labels")
    with processes(job.device):
        plan = EVALUATIONS[job.preset]
        if protocol == "finetune":
            own_part(plan.batch)  # can the processes share it? asked before a long pretraining
        run, data = _pretrained(job)
        for share in fraction or plan.fractions:
            row = judge(run, data, plan, share, subset, protocol, device=job.device)
            interval = f"95% interval {row['low']:.3f} to {row['high']:.3f}"
            said = f"{protocol} {share:g} ({row['labels']} labels): AUC {row['auc']:.3f}, {interval}"
            from_first(functools.partial(print, said, flush=True))


def main(words: list[str] | None = None) -> int:
    """Run one command of `python -m mocolayers`; returns its exit code."""
    commands = {"pretrain": pretrain, "finetune": finetune, "series": run_series}
    return run_command(commands, "python -m mocolayers", __doc__, words)


def run_command(commands: dict, prog: str, description: str, words: list[str] | None = None) -> int:
    """Run one of some functions as a command; an error that a person can mend is one line and exit code 1.

    Ctrl-C and SIGTERM are one line too. Processes of torchrun leave SIGTERM to the system, which needs no answer of a
    process that waits for another one.
    """
    about = {"prog": prog, "description": description, "config": (tyro.conf.FlagCreatePairsOff,)}
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _interrupted)
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, args=words, **about) or 0
    except (DatasetError, RunError, ValueError, OSError) as error:
        print("error:", error, *getattr(error, "__notes__", ()), file=sys.stderr)
        return 1
    except KeyboardInterrupt as came:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + (came.args[0] if came.args else signal.SIGINT)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def parse_changes(words: tuple[str, ...]) -> dict:
    """Fields of a recipe and their values from words such as lr=0.03."""
    changes = {}
    for word in words:
        name, _, value = word.partition("=")
        if not value:
            raise ValueError(f"--set {word}: write FIELD=VALUE, for example lr=0.03 batch=64 layout=resnet18")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            changes[name] = value  # a word, such as resnet18
    return changes


def _pretrained(job: Job):
    """The run that the options describe, trained if it is not there yet, and its data."""
    from mocolayers.data.prepared import load
    from mocolayers.training import pretrain as training
    from mocolayers.training.distributed import from_first
    from mocolayers.training.runs import initial_weights

    if job.plugin:
        load_plugin(job.plugin)
    name = from_first(lambda: load(job.dataset).name)  # one process makes what is missing, the others find it
    data, changes = load(name), parse_changes(job.set)
    if job.init:
        changes["init"] = initial_weights(job.init)[1]
    recipe = preset(job.preset, job.arm, data, job.seed, **changes)
    return training.pretrain(recipe, data, job.runs_dir, job.device, init=job.init, compiled=job.compile), data


if __name__ == "__main__":
    sys.exit(main())
