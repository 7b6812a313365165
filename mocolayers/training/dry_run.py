"""Try a recipe on this machine: some real steps, what they take in time and memory, and what the whole run would."""

import dataclasses
import time
from pathlib import Path

import torch

from mocolayers.data.prepared import MedicalImages
from mocolayers.recipe import RELEASED_SIDE, Recipe
from mocolayers.runtime import resolve_device
from mocolayers.training.pretrain import SMALLER, Trainer, memory_errors


def try_steps(recipe: Recipe, data: MedicalImages, device: str = "auto", init: Path | None = None) -> str:
    """Train two steps in memory, write nothing, and say in lines to print what the whole run would take.

    Raises:
        RunError: out of memory.
        ValueError: an arm without pretraining.
    """
    import psutil  # as in the series: nothing else needs it

    if not recipe.steps:
        raise ValueError(f"the arm {recipe.arm!r} is not pretrained: there is nothing to try")
    place, used, seconds = resolve_device(device), [], []

    def note(*_) -> None:
        on_gpu = place.type == "cuda"
        used.append(torch.cuda.max_memory_allocated(place) if on_gpu else psutil.Process().memory_info().rss)

    note()
    with memory_errors(recipe.batch, recipe.side, SMALLER):
        quiet = dataclasses.replace(recipe, log_every=10**9, monitor_every=10**9)
        trainer = Trainer(quiet, data, place, init)
        # After a forward pass all that its gradient needs is in memory, beside the gradients of the step before.
        trainer.model.register_forward_hook(note)
        for _ in range(2):
            started = time.perf_counter()
            trainer.train_step().loss.item()  # the value makes a GPU finish
            seconds.append(time.perf_counter() - started)
    note()
    side = RELEASED_SIDE.get(data.modality, data.side)
    paper = f"the paper's images have {side} px: prepare them with --side {side}"
    return f"""{recipe.arm} on {data.name}: {recipe.layout}, {data.side} px, {data.channels} channel(s)
  steps      {recipe.steps:,} at batch {trainer.batch}, {recipe.steps / trainer.steps_per_epoch:.0f} epochs
  speed      {trainer.batch / min(seconds):.1f} images/s (two views of each)
  memory     {(max(used) - used[0]) / 2**30:.1f} GB more than before the first step
  whole run  {recipe.steps * min(seconds) / 3600:.2f} hours on this machine""" + (
        f"\n  note       {paper}" if recipe.layout == "resnet50" and data.side != side else ""
    )
