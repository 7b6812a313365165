"""Errors with a remedy, atomic files, devices, precision, and the randomness of a step.

torch is imported inside the functions that need it, so that the data scripts start fast.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class DatasetError(Exception):
    """A prepared data set is missing, damaged or unfit for what was asked."""


class RunError(Exception):
    """A run's folder cannot be used, or a training cannot go on."""


@contextlib.contextmanager
def held(place: Path, wait: bool = True):
    """Lock a folder or file against other processes and threads; yields False if one has it and we do not wait.

    Also False if it was removed while we waited. The lock of a killed process ends with it. Windows locks neither and
    some network disks no folders: there it yields None.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    # Network disks lock only what is open for writing.
    writable = place.is_file() and os.access(place, os.W_OK)
    handle = os.open(place, os.O_RDWR if writable else os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        mine = os.fstat(handle).st_nlink > 0
    except BlockingIOError:
        mine = False
    except OSError:
        mine = None
    try:
        yield mine
    finally:
        os.close(handle)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary name beside `path`, then rename it to `path`; remove those that are a day old."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+-\d+")  # the form of the temporary name
    for left in [beside for beside in path.parent.iterdir() if ours.fullmatch(beside.name)]:
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:  # of a killed process; no lock here can be sure of that
                left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """Turn a full disk, or a folder that cannot be written, into one line that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}): free some space, or choose a folder that can be "
            "written. What was there is kept; the same command goes on"
        ) from None


def load_plugin(path: Path) -> None:
    """Run a Python file that adds arms to `recipe.ARMS`; torchrun and the study's jobs do it in each process."""
    if not path.is_file():
        raise RunError(f"{path} does not exist; --plugin wants a Python file that adds arms, see CONTRIBUTING.md")
    # Python finds the source of a class only through the module that it is registered under; the name is no one else's.
    name = f"mocolayers.plugin.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RunError(f"{path}, the file of --plugin, ends with {type(error).__name__}: {error}") from error


def step_generator(seed: int, step: int) -> "torch.Generator":
    """The source of all randomness of one step; the same for every arm."""
    import torch

    entropy = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def resolve_device(name: str) -> "torch.device":
    """The device of a name; "auto" is the first of an NVIDIA or AMD GPU, Apple's GPU, and the processor.

    Raises:
        RunError: an unknown name, or a device that this machine does not have.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    kind, _, number = name.partition(":")
    if kind not in there or not (number.isdecimal() or name == kind):
        raise RunError(f"device {name!r} is unknown; choose auto, {', '.join(there)}, or one of several: cuda:1")
    count = torch.cuda.device_count() if kind == "cuda" and number else 1
    if not there[kind] or int(number or 0) >= count:
        raise RunError(f"device {name!r} was asked for, but torch does not find it here; use --device cpu or auto")
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones; else Linux takes it back and clears it at every step."""
    with contextlib.suppress(AttributeError, TypeError):  # a system without glibc
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX and M_TRIM_THRESHOLD of its malloc.h
            ctypes.CDLL(None).mallopt(option, value)


def autocast_type(precision: str, device: "torch.device") -> "torch.dtype | None":
    """What a recipe's precision means on a device; None is fp32.

    "auto" is bf16 where the device has instructions for it: GPUs since NVIDIA's Ampere, processors with AVX512-BF16 or
    AMX. Elsewhere bf16 is emulated, and many times slower.
    """
    import torch

    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else None
