"""Pretraining speed of every arm against its compute bound, side by side in one run; writes results/bench.md.

The bound does the same encoder passes, backward pass, optimiser step and momentum update on fixed tensors: no views, no
queue, no stage loss, no monitors. Repeats go round all rows in turn, so that a slow minute hits all of them alike.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mocolayers.datasets import MedicalImages
from mocolayers.files import atomic_write
from mocolayers.moco import MoCo
from mocolayers.pretrain import Trainer
from mocolayers.recipe import PRETRAINED_ARMS, preset

CPU = torch.device("cpu")
OUT = Path(__file__).resolve().parents[2] / "results" / "bench.md"


def made_up_images(side: int, channels: int) -> MedicalImages:
    """Random pixels in memory; speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    n = 2048
    images = rng.integers(0, 256, (n, side, side, channels)).astype(np.uint8)
    card = {"task": "binary", "modality": "chest" if channels == 1 else "histology", "classes": ["a", "b"]}
    card["sha256"] = dict.fromkeys(("images", "labels", "patients", "split"), "made up")
    split = np.zeros(n, np.uint8)
    return MedicalImages("bench", card, images, rng.integers(0, 2, n), np.arange(n), split)


def trainer_step(data: MedicalImages, arm: str):
    """A function that does one real training step without monitors."""
    recipe = preset("lesson", arm, data, log_every=10**9, monitor_every=10**9, steps=10**8)
    trainer = Trainer(recipe, data, CPU)
    trainer.train_step()
    return trainer.train_step, recipe.batch


def bound_step(data: MedicalImages):
    """A function that does the encoder work of one MoCo step on fixed tensors."""
    recipe = preset("lesson", "moco", data)
    model = MoCo(recipe).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    x = torch.rand(recipe.batch, data.channels, data.side, data.side).to(memory_format=torch.channels_last)

    def step() -> None:
        embedding = model.head_q(model._encode(model.encoder_q, x).embedding)
        with torch.no_grad():
            model.momentum_update()
            model.head_k(model._encode(model.encoder_k, x).embedding)
        optimiser.zero_grad(set_to_none=True)
        embedding.square().mean().backward()
        optimiser.step()

    step()
    return step, recipe.batch


def measure(steps: dict, repeats: int, count: int) -> dict[str, float]:
    """Median pairs per second of each function, repeats taken in turn."""
    found = {name: [] for name in steps}
    for _ in tqdm(range(repeats), desc="repeats"):
        for name, (step, batch) in steps.items():
            started = time.perf_counter()
            for _ in range(count):
                step()
            found[name].append(count * batch / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all rows (5)")
    parser.add_argument("--count", type=int, default=4, help="steps per round (4)")
    args = parser.parse_args()
    lines = ["# Speed", "", "Made by `make bench`: lesson recipe, medians over rounds taken in turn.", ""]
    lines += [f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, PyTorch "]
    lines[-1] += torch.__version__.split("+")[0]
    for side, channels in ((28, 1), (28, 3)):
        data = made_up_images(side, channels)
        steps = {"compute bound": bound_step(data)} | {arm: trainer_step(data, arm) for arm in PRETRAINED_ARMS}
        speed = measure(steps, args.repeats, args.count)
        lines += [
            "",
            f"## {side} px, {channels} channel(s)",
            "",
            "| | pairs/s | of the bound | of moco |",
            "|---|---|---|---|",
        ]
        for name, value in speed.items():
            bound, moco = value / speed["compute bound"], value / speed["moco"]
            lines.append(f"| {name} | {value:.0f} | {bound:.2f} | {moco:.2f} |")
    text = "\n".join(lines) + "\n"
    atomic_write(OUT, lambda path: path.write_text(text, encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
