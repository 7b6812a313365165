"""A chest phantom for the benchmarks that look at results and not only at time."""

import subprocess
import sys
from pathlib import Path

from mocolayers.data.prepared import SCRIPTS, MedicalImages, load


def chest_phantom(folder: Path, images: int, side: int = 28) -> MedicalImages:
    """Draw it, as many images as asked for train, validation and test together, and load it."""
    options = ["--name", "chest_phantom", "--images", str(images), "--side", str(side), "--out", str(folder)]
    subprocess.run([sys.executable, str(SCRIPTS / "phantoms.py"), *options], check=True, stdout=subprocess.DEVNULL)
    return load("chest_phantom", folder)
