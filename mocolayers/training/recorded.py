"""A step on a GPU as a CUDA graph: its hundreds of small launches, recorded once, are one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM = 3  # steps in which compilers, cuDNN and the optimiser set things up, which no recording may hold


class Recorded:
    """A function of tensors whose shapes stay, recorded at its fourth call and from then on replayed.

    Whatever it does besides launching work on the GPU, it does no more. Each replay fills the same tensors that the
    recording returned. Needs a stream of its own as the current one, from before the first gradient on.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, step: Callable) -> None:
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, *inputs: Tensor):
        """What the function returns for these inputs, on the GPU."""
        self.calls += 1
        if self.calls <= WARM:
            return self.step(*inputs)
        if self.graph is None:
            self._record(inputs)
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.output

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        # "thread_local": another thread goes on to pin the memory of the next batch.
        about = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graph, **about):
            self.output = self.step(*self.inputs)
