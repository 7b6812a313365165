"""Pretraining speed against other loops, see `others`, on the same colour images and encoder, side by side."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from others import LightlyMoCo, Pairs, ReleasedMoCo, lightly_pairs, torchvision_pairs
from pretraining import CPU, bound_step, made_up_images, trainer_step
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from mocolayers.pretrain import autocast_type
from mocolayers.recipe import Recipe, preset

WARM = 2  # steps before the clock starts: another loop had the caches, and a loader's processes start and read ahead
AHEAD = 2  # batches that are being read when the clock stops


def steps_of(step: Callable, _batch: int) -> Callable[[int], float]:
    """A function from a number of steps to their seconds."""

    def run(count: int) -> float:
        for _ in range(WARM):
            step()
        started = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - started

    return run


def loop(model: nn.Module, pairs: Pairs, recipe: Recipe, workers: int) -> Callable[[int], float]:
    """The same for a plain loop over a DataLoader. Its processes end with the turn, or they would work in others'."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, recipe.lr, recipe.sgd_momentum, weight_decay=recipe.weight_decay)
    dtype = autocast_type(recipe.precision, CPU)

    def step(batches) -> None:
        x_q, x_k = next(batches)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x_q, x_k)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def run(count: int) -> float:
        drawn = RandomSampler(pairs, replacement=True, num_samples=recipe.batch * (WARM + count + AHEAD * workers))
        options = {"prefetch_factor": AHEAD} if workers else {}
        batches = iter(DataLoader(pairs, recipe.batch, sampler=drawn, num_workers=workers, **options))
        return steps_of(lambda: step(batches), recipe.batch)(count)

    return run


def runs(side: int, **changes) -> dict[str, tuple[Callable[[int], float], str]]:
    """Each row's function, and the row of ours that it is compared with."""
    data = made_up_images(side, 3, (512, 0, 0))
    moco, mse = (preset("lesson", arm, data, **changes) for arm in ("moco", "mse"))
    ours = {arm: (steps_of(*trainer_step(data, arm, **changes)), "") for arm in ("moco", "mse", "barlow-conditioned")}
    lightly, released = lightly_pairs(data), torchvision_pairs(data, moco)
    return {
        "compute bound": (steps_of(*bound_step(data, **changes)), ""),
        **{f"ours, {arm}": row for arm, row in ours.items()},
        "lightly's MoCo example, loading in process": (loop(LightlyMoCo(moco), lightly, moco, 0), "ours, moco"),
        "lightly's MoCo example, 2 loading processes": (loop(LightlyMoCo(moco), lightly, moco, 2), "ours, moco"),
        "torchvision v2 per image, plain MoCo loop": (loop(ReleasedMoCo(moco), released, moco, 0), "ours, moco"),
        "released loop with MSE, 2 loading processes": (loop(ReleasedMoCo(mse), released, mse, 2), "ours, mse"),
    }


def table(side: int, repeats: int, count: int, **changes) -> pd.DataFrame:
    """One row per loop: pairs per second, its share of the bound's in the same round, and how much faster ours is."""
    rows, batch = runs(side, **changes), changes.get("batch", 128)
    seconds = {name: [] for name in rows}
    for _ in tqdm(range(repeats), desc=f"{side} px"):
        for name, (run, _) in rows.items():
            seconds[name].append(run(count) / count)
    lines = []
    for name, (_, counterpart) in rows.items():
        own, bound = np.array(seconds[name]), seconds["compute bound"]
        times = f"{np.median(own / seconds[counterpart]):.2f}" if counterpart else ""
        lines.append([name, f"{batch / np.median(own):.0f}", f"{np.median(bound / own):.2f}", times])
    return pd.DataFrame(lines, columns=["loop", "pairs/s", "of the bound", "ours/theirs"])
