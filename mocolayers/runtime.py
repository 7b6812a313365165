"""Errors a person can do something about; every message names what is wrong and what to type next."""

import ctypes
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class DatasetError(Exception):
    """A prepared data set is missing, damaged or unfit for what was asked."""


class RunError(Exception):
    """A run's folder cannot be used, or a training cannot go on."""


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary name beside `path`, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


LARGEST = 2**25  # bytes of a block that is kept; glibc goes no higher by itself either


def keep_freed_memory(most: int = 2**29) -> bool:
    """Let glibc keep up to `most` free bytes; True if it does, False where there is no glibc.

    On a processor tensors come from malloc, which hands the feature maps of a step or a batch to the system at its end;
    the system then clears each of their pages again for the next one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, most) and mallopt(MMAP_THRESHOLD, LARGEST))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step; the same for every arm."""
    entropy = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU, in distributed training this process's, else the processor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RunError(f"device {name!r} was asked for, but torch finds no GPU here; use --device cpu or auto")
    return torch.device(name)


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """What a recipe's precision means on a device; None is fp32.

    bf16 pays on GPUs and on processors with AVX512-BF16 or AMX; elsewhere it is emulated, and many times slower.
    """
    types = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    if precision not in types:
        raise ValueError(f"precision {precision!r}: choose 'auto', {', '.join(map(repr, types))}")
    return types[precision]


def load_plugin(path: Path) -> None:
    """Stand-in: run a Python file that adds arms."""
    runpy.run_path(str(path))
