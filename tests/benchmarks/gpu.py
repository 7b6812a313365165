"""Measure speed and memory on a GPU and write study/bench_gpu.md; under eight minutes on one H100.

Every loop of a section has the same encoder, images, batch and precision. Rows take turns; ratios are of the same
round. The file is whole after every section. Images are random: synthetic, in memory.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from against import finish, loop
from others import ReleasedMoCo, lightly_moco, lightly_pairs, torchvision_pairs
from pretraining import bound_step, made_up_images, trainer_step

from mocolayers.data.views import to_float, views_of_numbers
from mocolayers.evaluation.features import SPLITS, stage_features
from mocolayers.evaluation.probes import fit_probe, linear_evaluation
from mocolayers.method.encoder import StagedResNet
from mocolayers.recipe import Evaluation, preset
from mocolayers.runtime import atomic_write, autocast_type, resolve_device
from mocolayers.training.runs import build_encoder

OUT = Path(__file__).resolve().parents[2] / "study" / "bench_gpu.md"
RESNET50 = {"layout": "resnet50", "width": 64, "stem": "imagenet"}
LONG = {"queue": 65_536, "bn_splits": 1}
# Title: image side, channels, preset, changes of its recipe.
SIZES = {
    "28 px gray, the lesson: ResNet-10 width 16, batch 128": (28, 1, "lesson", {}),
    "224 px colour: ResNet-50, batch 256": (224, 3, "lesson", RESNET50 | LONG | {"batch": 256}),
    "512 px gray, the paper's NIH recipe: ResNet-50, batch 16": (512, 1, "paper", {}),
    "64 px colour: ResNet-18, batch 256": (64, 3, "lesson", {"layout": "resnet18", "width": 64, "batch": 256}),
}
TINY = {"batch": 4, "queue": 8, "width": 2, "layout": "resnet10", "stem": "small", "bn_splits": 1}
TINY["precision"] = "fp32"  # bf16 with so few channels damages memory on some processors
SOLO = "solo-learn: the package that can be installed, 1.0.2, asks for torch 1.9.1 and PyTorch Lightning 1.4.7"
BEST = ("ours, moco, compiled", "ours, moco")


class Bench:
    """The settings of one run, and the rows of its sections as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny, self.out, self.rounds = args.tiny, args.out, 1 if args.tiny else args.rounds
        self.device = resolve_device("cpu" if args.tiny else args.device)
        self.workers = 0 if args.tiny else max(1, min(14, (os.cpu_count() or 2) - 2))
        self.end, self.sections = time.monotonic() + 60 * args.minutes, {}
        self.stop = self.end  # of the section

    def left(self) -> float:
        """Seconds left for the section."""
        return self.stop - time.monotonic()

    def keep(self, title: str, table: pd.DataFrame, note: str = "") -> None:
        """Print a section and write the file anew with all sections so far."""
        lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
        self.sections[title] = "\n".join(lines) + (f"\n\n{note}" if note else "")
        print(f"\n## {title}\n\n{self.sections[title]}\n\n{self.end - time.monotonic():.0f} s left", flush=True)
        text = [
            f"# Speed on a GPU\n\nMade by `make bench-gpu`: medians over {self.rounds} rounds in turn.",
            self.machine(),
        ]
        text += [f"## {name}\n\n{body}" for name, body in self.sections.items()]
        atomic_write(self.out, lambda path: path.write_text("\n\n".join(text) + "\n", encoding="utf-8"))

    def machine(self) -> str:
        """One line on what the numbers were measured on."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "a processor, no GPU"
        precision = "bf16" if autocast_type("auto", self.device) else "fp32"
        return f"{name}, {os.cpu_count()} cores, PyTorch {torch.__version__}, {precision}"

    def empty(self) -> None:
        """Give cached memory back, and count the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def gigabytes(self, before: int) -> str:
        """The peak of memory since `empty`, above what was there before; nothing on a processor."""
        return f"{(torch.cuda.max_memory_allocated(self.device) - before) / 2**30:.1f}" if before >= 0 else ""

    def allocated(self) -> int:
        """Bytes in use; -1 on a processor."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else -1


def timed(bench: Bench, step: Callable[[], object], batch: int) -> Callable[[], float]:
    """A turn of a step: pairs per second over about a second of steps."""

    def turn() -> float:
        finish(bench.device)
        count, started = 0, time.perf_counter()
        while not count or (time.perf_counter() - started < 1 and not bench.tiny):
            for _ in range(1 if bench.tiny else 5):
                step()
                count += 1
            finish(bench.device)
        return count * batch / (time.perf_counter() - started)

    return turn


def ours(bench: Bench, data, arm: str, name: str, changes: dict, compiled: bool = False) -> Callable[[], float]:
    """A turn of our training step; on a GPU, a compiled one is replayed as CUDA graphs."""
    torch._dynamo.reset()
    step, batch = trainer_step(data, arm, bench.device, name, compiled and not bench.tiny, **changes)
    for _ in range(5):  # until it is compiled and recorded
        step()
    return timed(bench, step, batch)


def views_alone(bench: Bench, data, name: str, changes: dict) -> Callable[[], float]:
    """A turn of nothing but the two views of a batch that is on the device already."""
    step, batch = trainer_step(data, "moco", bench.device, name, **changes)
    trainer = step.__self__
    images, numbers, _ = trainer._feed(3)

    return timed(bench, lambda: views_of_numbers(to_float(images), trainer.recipe.views, numbers), batch)


def theirs(bench: Bench, data, name: str, changes: dict, model: Callable, pairs: Callable, arm: str):
    """A turn of a loop over a DataLoader: as many batches as twice its processes, after one from each of them."""
    recipe = preset(name, arm, data, **changes)
    run = loop(model(recipe), pairs(data, recipe), recipe, bench.workers, bench.device, max(1, bench.workers))
    return lambda: run(max(1, 2 * bench.workers))


def training(bench: Bench, side: int, channels: int, name: str, changes: dict) -> tuple[pd.DataFrame, str]:
    """One row per loop: pairs per second, their share of the bound, how much faster ours is, and memory."""
    data = made_up_images(side, channels, (16 if bench.tiny else 512, 0, 0))
    makers = {
        "compute bound": lambda: timed(bench, *bound_step(data, bench.device, name, **changes)),
        "ours, moco": lambda: ours(bench, data, "moco", name, changes),
        "ours, mse": lambda: ours(bench, data, "mse", name, changes),
        "two views of ours alone": lambda: views_alone(bench, data, name, changes),
        f"lightly's MoCo example, {bench.workers} loading processes": lambda: theirs(
            bench, data, name, changes, lightly_moco, lambda data, _: lightly_pairs(data), "moco"
        ),
        f"released loop with MSE, {bench.workers} loading processes": lambda: theirs(
            bench, data, name, changes, ReleasedMoCo, torchvision_pairs, "mse"
        ),
        # Last: each takes a minute to compile.
        BEST[0]: lambda: ours(bench, data, "moco", name, changes, compiled=True),
        "ours, mse, compiled": lambda: ours(bench, data, "mse", name, changes, compiled=True),
    }
    turns, memory, seconds, notes = {}, {}, {}, []
    for row, make in makers.items():
        if bench.left() < 40 and row not in ("compute bound", BEST[-1]):
            notes.append(f"{row}: left out, no time.")
            continue
        bench.empty()
        before, started = bench.allocated(), time.monotonic()
        try:
            turn = make()
            turns[row], memory[row], seconds[row] = turn, bench.gigabytes(before), f"{time.monotonic() - started:.0f}"
        except Exception as error:  # one row that fails leaves the others
            notes.append(f"{row}: left out, {type(error).__name__}: {str(error).strip().splitlines()[:1]}.")
            print(notes[-1], flush=True)
    found = {row: [] for row in turns}
    for number in range(bench.rounds):
        if number and bench.left() < 20:
            notes.append(f"{number} rounds only, no time.")
            break
        for row, turn in turns.items():
            found[row].append(turn())
    speed, lines = {row: np.array(values) for row, values in found.items()}, []
    best = next(row for row in BEST if row in speed)
    for row, values in speed.items():
        shares = np.median(values / speed["compute bound"]), np.median(speed[best] / values)
        share, times = (f"{value:.2f}" for value in shares)
        lines.append([row, f"{np.median(values):.0f}", share, times, memory[row], seconds[row]])
    columns = ["loop", "pairs/s", "of the bound", f"{best}, is so many times as fast", "GB", "s to set up"]
    return pd.DataFrame(lines, columns=columns), " ".join(notes)


def evaluation(bench: Bench) -> tuple[pd.DataFrame, str]:
    """Linear evaluation of a ResNet-50 with 14 labels: features of every stage, then all penalties."""
    side, sizes = (16, (60, 20, 20)) if bench.tiny else (224, (14_000, 2_000, 4_000))
    data, rng = made_up_images(side, 3, sizes), np.random.default_rng(1)
    data.card.update(task="multilabel", classes=[str(n) for n in range(14)])
    labels = (rng.random((sum(sizes), 14)) < 0.1).astype(np.uint8)
    object.__setattr__(data, "labels", labels)
    changes = TINY if bench.tiny else RESNET50
    encoder = build_encoder(preset("lesson", "moco", data, **changes)).eval()
    lines = []
    bench.empty()
    before, started = bench.allocated(), time.perf_counter()
    features = {split: stage_features(encoder, data, data.rows(split), device=str(bench.device))[3] for split in SPLITS}
    spent = time.perf_counter() - started
    each = f"{sum(sizes) / spent:.0f}"
    lines.append([f"ours: features of {sum(sizes):,} images, {side} px", f"{spent:.1f}", each, bench.gigabytes(before)])
    few = data.rows("train")[: sizes[0] // 10]
    bench.empty()
    before, started = bench.allocated(), time.perf_counter()
    plain_features(encoder, data, few, bench.device)
    spent = time.perf_counter() - started
    each = f"{len(few) / spent:.0f}"
    lines.append([f"plain loop: of {len(few):,}, fp32, batches of 64", f"{spent:.1f}", each, bench.gigabytes(before)])
    plan = Evaluation()
    bench.empty()
    before, started = bench.allocated(), time.perf_counter()
    linear_evaluation(features, data, data.rows("train"), plan, str(bench.device))
    spent = time.perf_counter() - started
    fits = 14 * len(plan.penalties)
    lines.append([f"ours: {fits} logistic regressions", f"{spent:.1f}", "", bench.gigabytes(before)])
    started = time.perf_counter()
    fit_probe(features["train"], labels[data.rows("train")][:, :1].astype(bool), "multilabel", 0.01)
    lines.append(["scikit-learn: one of them, C = 0.01", f"{time.perf_counter() - started:.1f}", "", ""])
    return pd.DataFrame(lines, columns=["linear evaluation", "seconds", "images/s", "GB"]), "Random weights and labels."


@torch.no_grad()
def plain_features(encoder: StagedResNet, data, rows: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """How it is often done: read, copy, encode, wait, and again."""
    encoder, parts = encoder.to(device), []
    for group in np.array_split(rows, max(1, len(rows) // 64)):
        x = torch.from_numpy(data.images[group]).to(device).permute(0, 3, 1, 2).float() / 255
        parts.append(encoder(x).embedding.cpu().numpy())
    encoder.cpu()
    return parts


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1 (cuda)")
    parser.add_argument("--minutes", type=float, default=7.5, help="what would end later is left out (7.5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each row, if there is time (3)")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (study/bench_gpu.md)")
    parser.add_argument("--only", default="", help="sections whose title holds this word")
    parser.add_argument("--tiny", action="store_true", help="every section on a processor in seconds: does it run?")
    return parser


def main() -> None:
    args = arguments().parse_args()
    bench = Bench(args)
    print(bench.machine(), flush=True)
    sections = {}
    for title, (_, channels, name, changes) in SIZES.items():
        size = (32 if name == "paper" else 16, channels, name, changes | TINY) if bench.tiny else SIZES[title]
        sections[f"Pretraining, {title}"] = lambda size=size: training(bench, *size)
    sections["Linear evaluation, ResNet-50, 14 labels"] = lambda: evaluation(bench)
    chosen = [title for title in sections if args.only.lower() in title.lower()]
    for number, title in enumerate(chosen):
        now = time.monotonic()
        bench.stop = min(bench.end, now + 1.4 * (bench.end - now) / (len(chosen) - number))
        bench.keep(title, *sections[title]())
    bench.keep("Not measured", pd.DataFrame([[SOLO]], columns=["what and why"]))
    print(f"{bench.out} is written")


if __name__ == "__main__":
    main()
