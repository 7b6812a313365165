"""Imported first by every script: Ctrl-C while the libraries are still imported ends in one line as well."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

STOPPED = "stopped; the same command goes on where it was"


def _end(*_) -> None:
    if multiprocessing.parent_process() is None:  # a reading process leaves the line to the script
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(1)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not where a script is imported
    signal.signal(signal.SIGINT, _end)
