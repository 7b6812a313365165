"""Training in several processes that `torchrun` started; with one process, each function returns its input.

Whatever a process does with a batch, it does with its part of it: rows [r * B / N, (r + 1) * B / N) for process r of N.
"""

import contextlib
import gc
import inspect
import os
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor, distributed, nn

from mocolayers.method.collectives import mean_over_processes, rank, world_size
from mocolayers.runtime import RunError

PATIENCE = timedelta(minutes=30)  # a process may judge, read or write alone for so long while the others wait


@contextlib.contextmanager
def processes(device: str):
    """Join the processes of this training for the length of a `with`; without torchrun, nothing happens.

    Args:
        device: "cuda" (nccl) or "cpu" (gloo); "auto" takes the GPU if there is one.
    Raises:
        RunError: inside the `with`, when another process has ended.
    """
    if "RANK" not in os.environ:
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError; its text names the line of gloo's own source that failed.
        if not isinstance(error, distributed.DistError) and "gloo/transport/" not in str(error):
            raise
        raise RunError(
            "another process of this training has ended; its own message is above. The same command goes on from the "
            "last checkpoint"
        ) from None
    gc.collect()  # a model that was trained in parallel holds the group too, in a cycle
    distributed.destroy_process_group()


def averaged(row: dict[str, Tensor]) -> dict[str, float]:
    """Numbers under the same names on every process, averaged; they leave the device together."""
    values = torch.stack([value.detach().float() for value in row.values()])
    return dict(zip(row, mean_over_processes(values).tolist(), strict=True))


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every process the mean of all running means and variances; each followed only the images it saw."""
    if world_size() > 1:
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.copy_(mean_over_processes(buffer))


def share_rows(rows: np.ndarray, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`encode(rows)`, (n, ...), each process encoding some of the rows."""
    if world_size() == 1:
        return encode(rows)
    own = np.array_split(rows, world_size())[rank()]
    parts: list = [None] * world_size()
    distributed.all_gather_object(parts, encode(own) if len(own) else None)
    return np.concatenate([part for part in parts if part is not None])


def from_first(function: Callable[[], object]):
    """Call a function on process 0 only; every process gets the result, and waits for it."""
    if world_size() == 1:
        return function()
    result = [function() if rank() == 0 else None]
    distributed.broadcast_object_list(result)
    return result[0]


def parallel(module: nn.Module) -> nn.Module:
    """The module to call in training: it averages gradients over processes. With one process, the module itself."""
    if world_size() == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # the second is that of older versions of PyTorch
    name = next(name for name in names if name in inspect.signature(ddp).parameters)
    return ddp(module, **{name: False})
