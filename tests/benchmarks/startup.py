"""How long an import takes in a fresh process, against torch and torchvision alone."""

import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

BASE = "torch, torchvision"
IMPORTS = (BASE, f"{BASE}, mocolayers", f"{BASE}, mocolayers.training.pretrain", f"{BASE}, mocolayers.evaluation.judge")


def run_python(code: str) -> str:
    """What a fresh process prints."""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout


def seconds(modules: str) -> float:
    return float(run_python(f"import time; s = time.perf_counter(); import {modules}; print(time.perf_counter() - s)"))


def table(repeats: int) -> pd.DataFrame:
    """One row per import: median seconds, and the median of what it takes beyond torch and torchvision in its round."""
    rounds = [{modules: seconds(modules) for modules in IMPORTS} for _ in range(repeats)]
    rows = []
    for modules in IMPORTS:
        whole = statistics.median(each[modules] for each in rounds)
        beyond = statistics.median(each[modules] - each[BASE] for each in rounds)
        rows.append([f"import {modules}", f"{whole:.2f}", f"{beyond:.2f}"])
    return pd.DataFrame(rows, columns=["in a fresh process", "seconds", "beyond torch and torchvision"])
