"""Pretraining speed against other loops, see `others`, on the same colour images and encoder, side by side."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from others import Pairs, ReleasedMoCo, lightly_moco, lightly_pairs, torchvision_pairs
from pretraining import CPU, bound_step, made_up_images, measure, trainer_step
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from mocolayers.recipe import Recipe, preset
from mocolayers.runtime import autocast_type

WARM = 2  # steps before the clock starts, in which a loader's processes start and read ahead
AHEAD = 2  # batches that are being read when the clock stops
OURS = ("moco", "mse", "barlow-conditioned")


def loop(
    model: nn.Module, pairs: Pairs, recipe: Recipe, workers: int, device=CPU, warm: int = WARM
) -> Callable[[int], float]:
    """From a number of steps to pairs per second of a plain loop over a DataLoader.

    Its processes end with the turn, or they would work in others'.
    """
    on_gpu = device.type == "cuda"
    model.to(device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, recipe.lr, recipe.sgd_momentum, weight_decay=recipe.weight_decay)
    dtype = autocast_type(recipe.precision, device)

    def step(batches) -> None:
        x_q, x_k = (x.to(device, non_blocking=True) for x in next(batches))
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x_q, x_k)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def run(count: int) -> float:
        drawn = RandomSampler(pairs, replacement=True, num_samples=recipe.batch * (warm + count + AHEAD * workers))
        options = {"pin_memory": on_gpu} | ({"prefetch_factor": AHEAD} if workers else {})
        batches = iter(DataLoader(pairs, recipe.batch, sampler=drawn, num_workers=workers, **options))
        for _ in range(warm):
            step(batches)
        started = time.perf_counter()
        for _ in range(count):
            step(batches)
        finish(device)
        return count * recipe.batch / (time.perf_counter() - started)

    return run


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def others(data, **changes) -> dict[str, tuple[Callable[[int], float], str]]:
    """The loop of each row, and the row of ours that it is compared with."""
    moco, mse = (preset("lesson", arm, data, **changes) for arm in ("moco", "mse"))
    lightly, released = lightly_pairs(data), torchvision_pairs(data, moco)
    return {
        "lightly's MoCo example, loading in process": (loop(lightly_moco(moco), lightly, moco, 0), "ours, moco"),
        "lightly's MoCo example, 2 loading processes": (loop(lightly_moco(moco), lightly, moco, 2), "ours, moco"),
        "torchvision v2 per image, plain MoCo loop": (loop(ReleasedMoCo(moco), released, moco, 0), "ours, moco"),
        "released loop with MSE, 2 loading processes": (loop(ReleasedMoCo(mse), released, mse, 2), "ours, mse"),
    }


def table(side: int, repeats: int, count: int, **changes) -> pd.DataFrame:
    """One row per loop: pairs per second, its share of the bound's in the same round, and how much faster ours is.

    In a round the bound and ours take turns step by step, as a slow second would else move their ratio; then each of
    the others does its steps in a row.
    """
    data = made_up_images(side, 3, (512, 0, 0))
    steps = {"compute bound": bound_step(data, **changes)}
    steps |= {f"ours, {arm}": trainer_step(data, arm, **changes) for arm in OURS}
    loops = others(data, **changes)
    speeds: dict[str, list[float]] = {name: [] for name in [*steps, *loops]}
    for _ in tqdm(range(repeats), desc=f"{side} px"):
        for name, found in measure(steps, WARM + count, 1).items():
            speeds[name].append(np.median(found[WARM:]))
        for name, (run, _) in loops.items():
            speeds[name].append(run(count))
    speed, lines = {name: np.array(found) for name, found in speeds.items()}, []
    for name, found in speed.items():
        times = f"{np.median(speed[loops[name][1]] / found):.2f}" if name in loops else ""
        lines.append([name, f"{np.median(found):.0f}", f"{np.median(found / speed['compute bound']):.2f}", times])
    return pd.DataFrame(lines, columns=["loop", "pairs/s", "of the bound", "ours/theirs"])
