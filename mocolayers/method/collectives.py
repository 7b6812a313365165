"""Tensors over the processes that train together; with one process every function returns its input."""

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def own_part(count: int) -> slice:
    """Which rows of a batch of `count` this process holds."""
    if count % world_size():
        raise ValueError(
            f"a batch of {count} cannot be shared by {world_size()} processes; start a number of them that divides it"
        )
    each = count // world_size()
    return slice(rank() * each, (rank() + 1) * each)


@torch.no_grad()
def gather(part: Tensor) -> Tensor:
    """(B / N, ...) of each process to the same (B, ...) on all; without gradient."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over processes, with gradient.

    The gradient is that of the *sum* of all processes' losses. `DistributedDataParallel` then averages, which leaves
    the gradient that one process with the whole batch would find: of a loss that every process computes from such
    means, and of the mean of losses over rows.
    """
    return x if world_size() == 1 else all_reduce(x) / world_size()
