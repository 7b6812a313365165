"""Pretraining speed of every arm against its compute bound, side by side.

The bound does the same encoder passes, backward pass, optimiser step and momentum update in the same precision on fixed
tensors: no views, no queue, no stage loss, no monitors. Rounds are short and ratios are taken within a round, so that a
slow minute hits all rows alike.
"""

import time

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from mocolayers.data.prepared import MedicalImages
from mocolayers.recipe import PRETRAINED_ARMS, preset
from mocolayers.training.pretrain import Trainer

CPU = torch.device("cpu")


def made_up_images(side: int, channels: int, sizes: tuple[int, int, int] = (2048, 0, 0)) -> MedicalImages:
    """Random pixels in memory, as many as `sizes` for train, val and test; speed does not depend on what they show."""
    rng, n = np.random.default_rng(0), sum(sizes)
    images = rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    card = {"task": "binary", "modality": "chest" if channels == 1 else "histology", "classes": ["a", "b"]}
    card["sha256"] = dict.fromkeys(("images", "labels", "patients", "split"), "made up")
    split = np.repeat(np.arange(3, dtype=np.uint8), sizes)
    return MedicalImages("bench", card, images, rng.integers(0, 2, n), np.arange(n), split)


def trainer_step(data: MedicalImages, arm: str, device=CPU, name: str = "lesson", compiled=False, **changes):
    """A function that does one real training step without monitors, with a full queue."""
    recipe = preset(name, arm, data, log_every=10**9, monitor_every=10**9, **{"steps": 10**8} | changes)
    trainer = Trainer(recipe, data, device, compiled=compiled)
    trainer.model.enqueue(nn.functional.normalize(torch.randn(recipe.queue, recipe.dim), dim=1).to(device))
    trainer.step, trainer.held = 1, recipe.queue  # the first step would be logged
    trainer.train_step()
    return trainer.train_step, recipe.batch


def bound_step(data: MedicalImages, device=CPU, name: str = "lesson", **changes):
    """A function that does the encoder work of one MoCo step on fixed tensors."""
    recipe = preset(name, "moco", data, **changes)
    trainer = Trainer(recipe, data, device)
    model, optimiser = trainer.model, trainer.optimiser
    x = torch.rand(recipe.batch, data.channels, data.side, data.side, device=device)
    x = x.to(memory_format=torch.channels_last)

    def encode(encoder: nn.Module, head: nn.Module) -> torch.Tensor:
        return head(torch.cat([encoder(group).embedding for group in x.chunk(recipe.bn_splits)]))

    def step() -> None:
        with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype is not None):
            q = encode(model.encoder_q, model.head_q)
            with torch.no_grad():
                model.momentum_update()
                encode(model.encoder_k, model.head_k)
        optimiser.zero_grad(set_to_none=True)
        q.float().square().mean().backward()
        optimiser.step()

    step()
    return step, recipe.batch


def measure(steps: dict, rounds: int, count: int) -> dict[str, np.ndarray]:
    """Pairs (or what the number beside a step counts) per second in every round; each does a few steps in turn."""
    found = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, (step, batch) in steps.items():
            started = time.perf_counter()
            for _ in range(count):
                step()
            found[name].append(count * batch / (time.perf_counter() - started))
    return {name: np.array(values) for name, values in found.items()}


def table(side: int, channels: int, rounds: int, count: int) -> pd.DataFrame:
    """One row per arm: pairs per second, and as a share of the compute bound's and of MoCo's in the same round."""
    data = made_up_images(side, channels)
    steps = {"compute bound": bound_step(data)} | {arm: trainer_step(data, arm) for arm in PRETRAINED_ARMS}
    speed = measure(steps, rounds, count)
    rows = [
        [name, f"{np.median(v):.0f}", *(f"{np.median(v / speed[base]):.2f}" for base in ("compute bound", "moco"))]
        for name, v in speed.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "pairs/s", "of the bound", "of moco"])
