"""Try a recipe on this machine: two real steps, and what the whole run would take."""

import dataclasses
import time
from pathlib import Path

import torch

from mocolayers.data.prepared import MedicalImages
from mocolayers.recipe import Recipe
from mocolayers.runtime import resolve_device
from mocolayers.training.pretrain import SMALLER, Trainer, memory_errors


def try_steps(recipe: Recipe, data: MedicalImages, device: str = "auto", init: Path | None = None) -> str:
    """Train two steps in memory, write nothing, and say in lines to print what the whole run would take.

    Raises:
        RunError: out of memory.
        ValueError: an arm without pretraining.
    """
    if not recipe.steps:
        raise ValueError(f"the arm {recipe.arm!r} is not pretrained: there is nothing to try")
    place, seconds = resolve_device(device), []
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    with memory_errors(recipe.batch, recipe.side, SMALLER):
        trainer = Trainer(dataclasses.replace(recipe, log_every=10**9, monitor_every=10**9), data, place, init)
        for _ in range(2):
            started = time.perf_counter()
            trainer.train_step().loss.item()  # the value makes a GPU finish
            seconds.append(time.perf_counter() - started)
    memory = f", {torch.cuda.max_memory_allocated(place) / 2**30:.1f} GB at most" if place.type == "cuda" else ""
    return f"""{recipe.arm} on {data.name}: {recipe.layout}, {data.side} px, {data.channels} channel(s)
  steps      {recipe.steps:,} at batch {trainer.batch}, {recipe.steps / trainer.steps_per_epoch:.0f} epochs
  speed      {trainer.batch / min(seconds):.1f} images/s (two views of each){memory}
  whole run  {recipe.steps * min(seconds) / 3600:.2f} hours on this machine"""
