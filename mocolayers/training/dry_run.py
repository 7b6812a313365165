"""Try a recipe on this machine: some real steps, what they take in time and memory, and what the whole run would."""

import dataclasses
import resource
import sys
import time
from typing import NamedTuple

import psutil
import torch

from mocolayers.data.prepared import MedicalImages
from mocolayers.method.collectives import world_size
from mocolayers.recipe import RELEASED_SIDE, Recipe
from mocolayers.runtime import resolve_device
from mocolayers.training.pretrain import Trainer

SHARE = 0.8  # of the free memory that a step may be expected to take


GB = 2**30


class Tried(NamedTuple):
    """What was measured.

    Attributes:
        batch: images per step that were tried; below the recipe's where its batch would not fit.
        seconds: of the fastest step.
        peak: bytes at the highest point of the process, or of the GPU.
        free: bytes that were free before.
    """

    batch: int
    seconds: float
    peak: int
    free: int


def try_steps(recipe: Recipe, data: MedicalImages, device: str = "auto", init=None, steps: int = 2) -> Tried:
    """Train some steps in memory; nothing is written.

    A step at the smallest batch comes first. If memory that grows with the batch would not be free for the whole one,
    the largest batch that fits is tried.
    """
    place = resolve_device(device)
    smallest = 2 * max(recipe.bn_splits, world_size())  # batch-norm needs two
    free = _free(place)

    def measured(batch: int, count: int) -> tuple[float, int]:
        quiet = dataclasses.replace(recipe, batch=batch, log_every=10**9, monitor_every=10**9)
        return _measure(Trainer(quiet, data, place, init), count)

    batch = recipe.batch
    if batch > 2 * smallest:
        _, one = measured(smallest, 1)
        _, two = measured(2 * smallest, 1)
        each = max(two - one, 1) / smallest
        batch = min(batch, smallest + max(0, int((SHARE * free - one) / each)))
    seconds, peak = measured(batch, steps)
    return Tried(batch, seconds, peak, free)


def _measure(trainer: Trainer, steps: int) -> tuple[float, int]:
    """Seconds of the fastest step, and the highest memory so far."""
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        trainer.train_step().loss.item()  # the value makes a GPU finish
        seconds.append(time.perf_counter() - started)
    return min(seconds), _peak(trainer.device)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(recipe: Recipe, data: MedicalImages, tried: Tried, preset: str) -> str:
    """What was tried, and what it means for the whole run, in lines to print."""
    per_epoch = max(1, len(data.pretraining_rows()) // recipe.batch)
    epochs = recipe.steps / per_epoch
    speed = tried.batch / tried.seconds
    hours = recipe.steps * recipe.batch / speed / 3600
    lines = [
        f"{recipe.arm} on {data.name}, preset {preset}: {recipe.layout}, {data.side} px, {data.channels} channel(s)",
        f"  steps      {recipe.steps:,} at batch {recipe.batch}, {epochs:.0f} epochs of {per_epoch:,}",
        f"  speed      {speed:.1f} images/s (two views of each), measured at batch {tried.batch}",
        f"  memory     {tried.peak / GB:.1f} GB at the highest, {tried.free / GB:.1f} GB were free",
        f"  whole run  {_duration(hours)} on this machine",
    ]
    if tried.batch < recipe.batch:
        lines.append(f"  note       batch {recipe.batch} would not fit into the free memory: {tried.batch} was tried")
    side = RELEASED_SIDE.get(data.modality)
    if recipe.layout == "resnet50" and side and data.side != side:
        lines.append(f"  note       the paper's images have {side} px: prepare them with --side {side}")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
