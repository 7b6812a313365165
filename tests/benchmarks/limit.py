"""How near the encoders' work is to what this processor can do: operations per second beside a large matrix product's.

A convolution or matrix product counts two operations per multiplication and addition, everything else (batch-norm,
ReLU, optimiser, momentum) none, though it takes its time.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from pretraining import CPU, bound_step, made_up_images, measure
from torch.utils.flop_counter import FlopCounterMode

from mocolayers.runtime import autocast_type

SIDE = 2048  # of the square matrices: 24 MB of bf16 for the three, far more than the caches hold
ENCODERS = {
    "ResNet-10 width 16, 28 px gray, batch 128": (28, 1, {}),
    "ResNet-10 width 16, 64 px colour, batch 128": (64, 3, {}),
    "ResNet-18 width 64, 128 px colour, batch 32": (
        128,
        3,
        {"layout": "resnet18", "width": 64, "stem": "imagenet", "batch": 32},
    ),
}


def table(rounds: int) -> pd.DataFrame:
    """One row per compute bound and one for the product: billions of operations, and of operations per second."""
    dtype = autocast_type("auto", CPU) or torch.float32
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    product = f"product of two {SIDE} x {SIDE} matrices"
    pieces: dict[str, Callable] = {product: lambda: a @ b}
    for name, (side, channels, changes) in ENCODERS.items():
        pieces[f"compute bound, {name}"] = bound_step(made_up_images(side, channels, (512, 0, 0)), **changes)[0]
    work = {name: operations(piece) for name, piece in pieces.items()}
    speed = measure({name: (piece, work[name]) for name, piece in pieces.items()}, rounds, 1)
    best = speed[product]
    rows = [
        [name, f"{work[name] / 1e9:.1f}", f"{np.median(v) / 1e9:.0f}", f"{np.median(v / best):.2f}"]
        for name, v in speed.items()
    ]
    return pd.DataFrame(rows, columns=["piece of work", "billion operations", "billion per second", "of the product"])


def operations(piece: Callable) -> int:
    """Multiplications and additions of a piece of work, as torch counts them from its shapes."""
    with FlopCounterMode(display=False) as counter:
        piece()
    return counter.get_total_flops()
