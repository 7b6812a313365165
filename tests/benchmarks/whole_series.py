"""Measure every notebook, and write study/notebooks.md: time and memory from no runs, then the series again, warm.

On the default data, at smoke and at lesson.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from bench import machine, markdown

from mocolayers.runtime import atomic_write

OUT = Path(__file__).resolve().parents[2] / "study" / "notebooks.md"


def series(preset: str, folder: Path) -> float:
    """Seconds of `python -m mocolayers series`, as `make run` calls it."""
    command = [sys.executable, "-m", "mocolayers", "series", "--preset", preset]
    command += ["--runs-dir", str(folder / "runs"), "--out", str(folder / "executed")]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def measured(preset: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Seconds and megabytes of each notebook, and of the series when it is new and when it is warm."""
    first, again = series(preset, folder), series(preset, folder)
    stamps = sorted((folder / "executed").glob("*/*/seed0/*.json"))
    cells = [json.loads(stamp.read_text()) for stamp in stamps]
    found = {cell["notebook"]: (f"{cell['seconds']:.0f}", str(cell["megabytes"])) for cell in cells}
    most = max(cell["megabytes"] for cell in cells)
    return found | {"the whole series": (f"{first:.0f}", str(most)), "the series again, warm": (f"{again:.1f}", "")}


def table(keep: Path | None = None) -> pd.DataFrame:
    """One row per notebook: seconds and peak memory in megabytes of the largest process, at smoke and at lesson.

    Args:
        keep: an empty folder for the runs and the executed notebooks; None throws them away.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        presets = [measured(preset, folder / preset) for preset in ("smoke", "lesson")]
    rows = [[name, *(text for found in presets for text in found.get(name, ("", "")))] for name in presets[0]]
    return pd.DataFrame(rows, columns=["notebook", "smoke, s", "smoke, MB", "lesson, s", "lesson, MB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="empty folder to keep runs and executed notebooks in (thrown away)")
    head = "# Notebooks\n\nMade by `make bench`. Two notebooks run at a time, each with half of the cores."
    text = f"{head}\n\n{machine()}\n\n{markdown(table(parser.parse_args().keep))}\n"
    atomic_write(OUT, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{OUT} is written")


if __name__ == "__main__":
    main()
