"""TODO mocolayers.evaluation.features."""

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import batches, to_float
from mocolayers.method.encoder import StagedResNet
from mocolayers.runtime import atomic_write
from mocolayers.training.distributed import share_rows
from mocolayers.training.runs import Run


@torch.no_grad()
def encode(encoder: StagedResNet, data: MedicalImages, rows: np.ndarray, batch: int = 250) -> np.ndarray:
    """(n, D) embeddings of the given rows, with batch-norm in evaluation mode."""
    encoder.eval()
    device = next(encoder.parameters()).device

    def encoded(own: np.ndarray) -> np.ndarray:
        return torch.cat([encoder(x).embedding.float().cpu() for x in batches(data, own, device, batch)]).numpy()

    return share_rows(rows, encoded)


def encode_splits(encoder: StagedResNet, data: MedicalImages) -> dict[str, np.ndarray]:
    """Embeddings of "train", "val" and "test", rows as in `data.rows(split)`."""
    return {split: encode(encoder, data, data.rows(split)) for split in ("train", "val", "test")}


STAGES = (1, 2, 3, 4)


PIXEL_SIDE = 28


SPLITS = ("train", "val", "test")


@torch.no_grad()
def stage_features(
    encoder: StagedResNet, data: MedicalImages, rows: np.ndarray, pool: int = 1, batch: int = 250
) -> list[np.ndarray]:
    """What each of the four stages says of the given rows, with batch-norm in evaluation mode.

    Args:
        encoder: any `StagedResNet`.
        data: its images.
        rows: (n,) row numbers.
        pool: each stage's map is averaged to pool x pool places; 1 is the global average.
        batch: images per forward pass.
    Returns:
        Four float32 arrays (n, C_l * pool * pool). With pool=1 the last one is the embedding.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    parts = []
    for x in batches(data, rows, device, batch):
        stages = encoder(x).stages
        parts.append([F.adaptive_avg_pool2d(stage, pool).flatten(1).float().cpu().numpy() for stage in stages])
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


def kept_stage_features(run: Run, data: MedicalImages, pool: int = 1) -> list[dict[str, np.ndarray]]:
    """Features of a run per stage and split, rows as in `data.rows(split)`; computed once and kept with the run."""
    place = run.folder / "features" / f"{data.fingerprint}-pool{pool}.safetensors"
    if not place.is_file():
        encoder, found = run.load_encoder(), {}
        for split in SPLITS:
            for stage, array in zip(STAGES, stage_features(encoder, data, data.rows(split), pool), strict=True):
                found[f"{split}.{stage}"] = array
        place.parent.mkdir(exist_ok=True)
        atomic_write(place, lambda path: save_file(found, path))
    arrays = load_file(place)
    return [{split: arrays[f"{split}.{stage}"] for split in SPLITS} for stage in STAGES]


def run_features(run: Run, data: MedicalImages, pool: int = 1, device: str = "auto") -> list[dict[str, np.ndarray]]:
    """Stand-in: features of a run per stage and split."""
    return kept_stage_features(run, data, pool)


def pixel_features(data: MedicalImages) -> dict[str, np.ndarray]:
    """The images themselves as features, averaged to at most 28 x 28 pixels: (n, 28 * 28 * C) per split."""
    found = {}
    for split in SPLITS:
        x = to_float(torch.from_numpy(data.images[data.rows(split)]))
        if data.side > PIXEL_SIDE:
            x = F.adaptive_avg_pool2d(x, PIXEL_SIDE)
        found[split] = x.flatten(1).numpy()
    return found
