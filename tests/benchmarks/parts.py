"""What the parts of a training step cost: queue, batch, stages with a loss, and what is done besides the encoder."""

import functools
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from pretraining import made_up_images, measure, trainer_step
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.data.views import two_views
from mocolayers.method.losses import STAGE_LOSSES, info_nce
from mocolayers.recipe import preset
from mocolayers.training.pretrain import build_moco

STAGE_ARMS = ("mse", "mse-standardized", "barlow-conditioned", "barlow")
QUEUES, BATCHES = (1024, 4096, 16_384, 65_536), (32, 128, 512)


class FirstStages(nn.Module):
    """The MSE loss of the first few stages; the others cost nothing but their pooling."""

    def __init__(self, pool: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.pool, self.count = pool, count
        self.loss = STAGE_LOSSES["mse"]([], pool)

    def forward(self, query: list[Tensor], key: list[Tensor]) -> list[Tensor]:
        losses = self.loss(query[: self.count], key[: self.count])
        return losses + [losses[0].new_zeros(())] * (len(query) - self.count)


def stage_step(data, count: int):
    """A real training step with a loss on the first stages, or on none."""
    step, batch = trainer_step(data, "mse" if count else "moco")
    if count:
        model = step.__self__.model
        model.stage_loss = FirstStages(model.stage_loss.pool, count)
    return step, batch


def step_table(repeats: int, count: int) -> pd.DataFrame:
    """One row per queue length, batch and number of stages with a loss: pairs per second and ms per step."""
    data = made_up_images(28, 1)
    steps = {f"queue of {n:,}": trainer_step(data, "moco", queue=n) for n in QUEUES}
    steps |= {f"batch of {n}": trainer_step(data, "moco", batch=n) for n in BATCHES}
    steps |= {f"MSE on {n} stages": stage_step(data, n) for n in range(5)}
    speed = {name: statistics.median(values) for name, values in measure(steps, repeats, count).items()}
    rows = [[name, f"{v:.0f}", f"{1000 * steps[name][1] / v:.1f}"] for name, v in speed.items()]
    return pd.DataFrame(rows, columns=["step of the arm moco, lesson, 28 px gray, with", "pairs/s", "ms per step"])


def part_table(repeats: int) -> pd.DataFrame:
    """Milliseconds of what a step does besides the encoder, each alone."""
    parts = {}
    for side, channels in ((28, 1), (28, 3), (64, 3)):
        data = made_up_images(side, channels, (128, 0, 0))
        images, views = torch.from_numpy(data.images), preset("lesson", "moco", data).views
        name = f"two views of 128 images, {side} px {'gray' if channels == 1 else 'colour'}"
        parts[name] = functools.partial(two_views, images, views, torch.Generator())
    data = made_up_images(28, 1, (128, 0, 0))
    parts["momentum update, lesson's ResNet-10 width 16"] = build_moco(preset("lesson", "moco", data)).momentum_update
    released = build_moco(preset("paper", "moco", data, queue=128))
    parts["momentum update, ResNet-50 width 64"] = released.momentum_update
    parts |= {f"stage losses of {arm} and their gradient, bf16": stage_losses(data, arm) for arm in STAGE_ARMS}
    width = preset("lesson", "barlow", data).stage_options["projector"]
    parts[f"of barlow's, the matrix products of {width} by {width} alone"] = projector_products(width)
    keys = F.normalize(torch.randn(128, 128), dim=1)
    for length in QUEUES:
        model = build_moco(preset("lesson", "moco", data, queue=length))
        parts[f"queue update, 128 keys into {length:,}"] = lambda model=model: model.enqueue(keys)
        parts[f"InfoNCE and its gradient, queue of {length:,}"] = contrast(keys, length)
    rows = [[name, f"{1000 * middle(part, 4 * repeats):.2f}"] for name, part in parts.items()]
    return pd.DataFrame(rows, columns=["part", "ms"])


def stage_losses(data, arm: str) -> Callable[[], None]:
    """The losses of an arm on stages as the model hands them over, pooled."""
    model = build_moco(preset("lesson", arm, data))
    pooled = zip(model.encoder_q.stage_channels, model.stage_loss.pool, strict=True)
    query, key = zip(*(torch.randn(2, 128, c, side, side).requires_grad_() for c, side in pooled), strict=True)

    def step() -> None:
        model.stage_loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(model.stage_loss(query, key))
        loss.backward()

    return step


def projector_products(width: int) -> Callable[[], None]:
    """Forward and backward, for four stages: two layers for 256 projections of two views, and the correlations.

    Any implementation has to do these, so they are less than the loss can cost.
    """
    x, w = torch.randn(256, width).bfloat16(), torch.randn(width, width).bfloat16()

    def step() -> None:
        for _ in range(4):
            for _ in range(2):
                x @ w, x @ w.T, x.T @ x
            x[:128].T @ x[128:], x[:128] @ w, x[128:] @ w

    return step


def contrast(keys: Tensor, length: int) -> Callable[[], None]:
    queries, queue = keys.clone().requires_grad_(), F.normalize(torch.randn(length, keys.shape[1]), dim=1)
    return lambda: info_nce(queries, keys, queue, 0.1)[0].backward()


def middle(function: Callable, repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
