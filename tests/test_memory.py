"""What `keep_freed_memory` claims: steps that need the same memory again get it without new pages from the system."""

import os
import platform
import subprocess
import sys

import pytest

PAGES_OF_A_STEP = """
import resource, sys, torch
from mocolayers.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [torch.ones(2**20) for _ in range(80)]  # 80 blocks of 4 MB, written and freed together
for _ in range(3):
    step()
before = faults()
step()
print(faults() - before)
"""


def pages(mode: str) -> int:
    words = [sys.executable, "-c", PAGES_OF_A_STEP, mode]
    # Blocks of that size go back to the system at once, whatever else lies in memory by chance.
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(subprocess.run(words, check=True, capture_output=True, text=True, env=returned).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory on demand")
def test_a_step_gets_the_memory_of_the_step_before():
    new, kept = pages("new"), pages("kept")
    assert kept < 100 < new  # also where a page has 2 MB
