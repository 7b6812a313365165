"""Frozen features: every stage of an encoder, encoded once on the chosen device, and raw pixels beside them."""

import copy

import numpy as np
import torch
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import batch_size, batches
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import pool_stage
from mocolayers.runtime import resolve_device
from mocolayers.training.distributed import from_first, share_rows
from mocolayers.training.pretrain import gpu_precision, memory_errors
from mocolayers.training.runs import Run, read_kept, save_kept

STAGES = (1, 2, 3, 4)
SPLITS = ("train", "val", "test")
PIXEL_SIDE = 28


def stage_features(
    encoder: StagedResNet, data: MedicalImages, rows: np.ndarray, pool: int = 1, device: str = "auto"
) -> list[np.ndarray]:
    """What each of the four stages says of the given rows, with batch-norm in evaluation mode.

    Args:
        encoder: stays where and as it is; a copy of it works on the device.
        rows: (n,) row numbers.
        pool: each stage's map is averaged to pool x pool places; 1 is the global average.
    Returns:
        Four float32 arrays (n, C_l * pool * pool). With pool=1 the last one is the embedding.
    Raises:
        ValueError: a stage has fewer than pool x pool places.
    """
    return _encoded(copy.deepcopy(encoder).to(resolve_device(device)).eval(), data, rows, pool)


@torch.no_grad()
def _encoded(encoder: StagedResNet, data: MedicalImages, rows: np.ndarray, pool: int) -> list[np.ndarray]:
    device = encoder.conv1.weight.device
    if device.type == "cuda":
        encoder = encoder.to(memory_format=torch.channels_last)

    def pooled(own: np.ndarray) -> np.ndarray:
        parts = []
        for x in batches(data, own, device):
            with gpu_precision(device):
                stages = encoder(x).stages
            means = [pool_stage(stage.float(), pool).flatten(1) for stage in stages]
            parts.append(torch.cat(means, dim=1).cpu().numpy())
        return np.concatenate(parts)

    with memory_errors(batch_size(data.side, device), data.side):
        whole = share_rows(rows, pooled)
    ends = np.cumsum(encoder.stage_channels)[:-1] * pool**2
    return [np.ascontiguousarray(stage) for stage in np.split(whole, ends, axis=1)]


def run_features(run: Run, data: MedicalImages, pool: int = 1, device: str = "auto") -> list[dict[str, np.ndarray]]:
    """`stage_features` of a run, one dictionary of splits per stage, rows as in `data.rows(split)`; kept with the run.

    The file's name holds the hash of the encoder's weights and the fingerprint of the data.
    """
    place = run.folder / "features" / f"{run.weights_hash}-{data.fingerprint}-pool{pool}.safetensors"
    found = from_first(lambda: read_kept(place)[1])
    if not found:
        encoder = run.load_encoder().to(resolve_device(device))
        for split in SPLITS:
            stages = _encoded(encoder, data, data.rows(split), pool)
            found |= {f"{split}.{n}": torch.from_numpy(stage) for n, stage in zip(STAGES, stages, strict=True)}
        from_first(lambda: save_kept(place, found))
    return [{split: found[f"{split}.{stage}"].numpy() for split in SPLITS} for stage in STAGES]


def pixel_features(data: MedicalImages) -> dict[str, np.ndarray]:
    """The images themselves as features, averaged to at most 28 x 28 pixels: (n, 28 * 28 * C) per split."""
    found = {}
    for split in SPLITS:
        whole = batches(data, data.rows(split), torch.device("cpu"))
        pooled = [F.adaptive_avg_pool2d(x, min(data.side, PIXEL_SIDE)).flatten(1) for x in whole]
        found[split] = torch.cat(pooled).numpy()
    return found
