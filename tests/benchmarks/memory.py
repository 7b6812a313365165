"""What keeping the memory of freed tensors gains a training step on a processor, two processes in turn."""

import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

# Of made-up images: side, channels, batch, and what changes in the lesson's recipe.
WIDER = {"layout": "resnet18", "stem": "imagenet"}
STEPS = {
    "ResNet-10 width 16, 28 px gray, batch 128": (28, 1, {}),
    "ResNet-10 width 16, 64 px colour, batch 128": (64, 3, {}),
    "ResNet-18 width 16, 128 px colour, batch 128": (128, 3, WIDER),
}
KINDS = ("given back", "kept")
# Does a step and prints its seconds and the most memory so far in MB, for each line that it reads. (`getrusage` would
# begin with the memory of the process that started this one.)
WORKER = """
import sys, time
from pathlib import Path
from pretraining import made_up_images, trainer_step
from mocolayers.runtime import keep_freed_memory
side, channels, changes, kind = eval(sys.argv[1])
if kind == "kept":
    keep_freed_memory()
step, _ = trainer_step(made_up_images(side, channels, (512, 0, 0)), "moco", **changes)
for line in sys.stdin:
    started = time.perf_counter()
    step()
    seconds, status = time.perf_counter() - started, Path("/proc/self/status")
    most = status.read_text().partition("VmHWM:")[2].split()[0] if status.is_file() else "nan"
    print(seconds, float(most) / 1024, flush=True)
"""


def table(rounds: int) -> pd.DataFrame:
    """One row per size: milliseconds of a step and peak memory of both kinds, and how many times as fast the second is.

    Memory is kept on Linux only; elsewhere both do the same.
    """
    rows = []
    for name, (side, channels, changes) in STEPS.items():
        words = [sys.executable, "-c", WORKER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
        workers = {k: subprocess.Popen([*words, repr((side, channels, changes, k))], **pipes) for k in KINDS}
        seconds, most = {kind: [] for kind in KINDS}, {}
        for number in range(rounds + 3):
            for kind, worker in workers.items():
                took, most[kind] = one(worker)
                if number >= 3:  # the first steps are slower
                    seconds[kind].append(took)
        for worker in workers.values():
            worker.communicate()
        faster = statistics.median(back / kept for back, kept in zip(*seconds.values(), strict=True))
        middle = {kind: f"{1000 * statistics.median(values):.0f}" for kind, values in seconds.items()}
        rows.append([name, *middle.values(), f"{faster:.2f}", *(f"{most[kind]:.0f}" for kind in KINDS)])
    names = [f"ms, {kind}" for kind in KINDS] + ["times as fast"] + [f"MB at most, {kind}" for kind in KINDS]
    return pd.DataFrame(rows, columns=["step of the arm moco, memory", *names])


def one(worker: subprocess.Popen) -> tuple[float, float]:
    """Seconds of a step of a worker, and the most memory that it has taken, in MB."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    seconds, memory = worker.stdout.readline().split()
    return float(seconds), float(memory)
