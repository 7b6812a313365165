"""Converting many X-rays: images per second and memory, on a made-up tree in the layout of NIH ChestX-ray14."""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image
from tqdm import tqdm

from mocolayers.data.prepared import SCRIPTS

DISTINCT = 50  # different pictures; the decoder does not know that it has seen one before
MB = 2**20


def made_up_tree(root: Path, count: int, side: int = 256) -> Path:
    """`count` gray PNGs of `side` px, two per patient, with the publisher's table."""
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (32, 32)).astype(np.uint8)) for _ in range(DISTINCT)]
    pixels = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) // 2 for image in smooth]
    noisy = [Image.fromarray(p + rng.integers(0, 8, p.shape).astype(np.uint8)) for p in pixels]
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    for number in tqdm(range(count), desc="made-up X-rays"):
        folder = root / f"images_{number // 10_000 + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number // 2:08d}_{number % 2:03d}.png"
        noisy[number % DISTINCT].save(folder / name, compress_level=1)
        lines.append(f"{name},{'Mass' if number % 3 else 'No Finding'},{number % 2},{number // 2}")
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root


def convert(source: Path, out: Path, workers: int = 2) -> tuple[float, int]:
    """Seconds, and the highest memory of the script and its processes together in bytes (shared pages count once)."""
    command = [sys.executable, str(SCRIPTS / "nih.py"), "--source", str(source), "--out", str(out)]
    started, highest, over = time.perf_counter(), [0], threading.Event()
    running = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)

    def watch() -> None:
        while not over.wait(0.2):
            try:
                script = psutil.Process(running.pid)
                family = [script, *script.children(recursive=True)]
                highest[0] = max(highest[0], sum(process.memory_full_info().pss for process in family))
            except psutil.NoSuchProcess:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = running.wait()
    over.set()
    watcher.join()
    if code:
        raise RuntimeError("the conversion failed; its message stands above")
    return time.perf_counter() - started, highest[0]


def table(count: int) -> pd.DataFrame:
    """One row: how many images of 256 px to 28 px, images per second, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = made_up_tree(Path(folder) / "nih", count)
        seconds, memory = convert(source, Path(folder) / "out")
    rows = [[f"{count:,}", f"{seconds:.0f}", f"{count / seconds:.0f}", f"{memory / MB:.0f}"]]
    return pd.DataFrame(rows, columns=["images", "seconds", "images/s", "peak memory, MB"])
