"""What it costs to ask the system for memory anew in every step: the same step in processes that keep it or do not."""

import contextlib
import statistics
import time
from unittest.mock import patch

import pandas as pd
from startup import run_python
from tqdm import tqdm

from mocolayers.notebook.series import PeakMemory

SIZES = {
    "ResNet-10 width 16, 28 px, batch 128": (28, {}),
    "ResNet-10 width 16, 64 px, batch 128": (64, {}),
    "ResNet-50 width 64, 128 px, batch 16": (128, {"layout": "resnet50", "width": 64, "stem": "imagenet", "batch": 16}),
}


def main(size: str, mode: str) -> None:
    """Print the median milliseconds of a step."""
    from pretraining import made_up_images, trainer_step

    side, changes = SIZES[size]
    with patch("mocolayers.moco.keep_freed_memory") if mode == "returned" else contextlib.nullcontext():
        step, _ = trainer_step(made_up_images(side, 3, (256, 0, 0)), "moco", **changes)
    step()
    times, end = [], time.perf_counter() + 5
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    print(1000 * statistics.median(times))


def measured(size: str, mode: str) -> tuple[float, int]:
    """Milliseconds of a step in a process of its own, and that process's peak memory in megabytes."""
    with PeakMemory() as memory:
        milliseconds = float(run_python(f"from kept import main; main({size!r}, {mode!r})"))
    return milliseconds, memory.megabytes


def table(repeats: int) -> pd.DataFrame:
    """One row per size of training: milliseconds of a step and peak memory, with memory returned and kept."""
    rows = []
    for size in tqdm(SIZES, desc="memory"):
        found = {mode: [] for mode in ("returned", "kept")}
        for _ in range(repeats):
            for mode, each in found.items():
                each.append(measured(size, mode))
        (slow, less), (fast, more) = (map(statistics.median, zip(*each, strict=True)) for each in found.values())
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(*found.values(), strict=True))
        rows.append([size, f"{slow:.0f}", f"{fast:.0f}", f"{ratio:.2f}", f"{less:.0f}", f"{more:.0f}"])
    columns = ["moco, colour", "ms, returned", "ms, kept", "returned/kept", "MB, returned", "MB, kept"]
    return pd.DataFrame(rows, columns=columns)
