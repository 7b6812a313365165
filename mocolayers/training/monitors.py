"""What to watch while MoCo trains: is it learning, has it collapsed, and what does each loss term really do?

All but the kNN monitor stay on the device; reading a number makes a GPU finish its work.
"""

import numpy as np
import torch
from torch import Tensor

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import batches
from mocolayers.method.collectives import mean_over_processes
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import cross_correlation, stage_distance
from mocolayers.method.moco import MoCoOutput
from mocolayers.training.distributed import share_rows


@torch.no_grad()
def contrastive_accuracy(logits: Tensor) -> Tensor:
    """Share of queries whose own key beats every key of the queue; logits (B, 1 + K), positive first."""
    return (logits.argmax(dim=1) == 0).float().mean()


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of centred features (B, D): 1 means collapsed.

    Source: Roy and Vetterli 2007, on the centred matrix.
    """
    values = torch.linalg.svdvals((z - z.mean(dim=0)).float())
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


@torch.no_grad()
def stage_statistics(output: MoCoOutput) -> dict[str, Tensor]:
    """Per stage, on averages over its map: raw MSE, scale-free distance, feature norm, cross-correlation means."""
    row = {}
    for number, (u, v) in enumerate(zip(output.query_stages, output.key_stages, strict=True), start=1):
        u, v = u.float().mean(dim=(2, 3)), v.float().mean(dim=(2, 3))  # (B, C_l)
        c = cross_correlation(u, v)
        diagonal = c.diagonal()
        off = (c.abs().sum() - diagonal.abs().sum()) / max(1, c.numel() - len(c))
        row |= {
            f"stage{number}_mse": stage_distance(u, v),
            f"stage{number}_scale_free": stage_distance(u, v, scale_free=True),
            f"stage{number}_norm": u.norm(dim=1).mean(),
            f"stage{number}_diagonal": diagonal.mean(),
            f"stage{number}_off_diagonal": off,
        }
    return row


def gradient_shares(output: MoCoOutput, parameters: list[Tensor]) -> dict[str, Tensor]:
    """Each loss term's share of the summed gradient norms on the query encoder; the shares add up to 1."""
    norms = {}
    for name, term in output.terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        whole = [mean_over_processes(g.float()) for g in gradients if g is not None]
        norms[name] = sum(g.square().sum() for g in whole) ** 0.5
    total = sum(norms.values()).clamp_min(1e-12)
    return {f"gradient_{name}": norm / total for name, norm in norms.items()}


@torch.no_grad()
def embed(encoder: StagedResNet, data: MedicalImages, rows: np.ndarray) -> np.ndarray:
    """(n, D) embeddings of some rows, with batch-norm in evaluation mode; processes share the work."""
    encoder.eval()
    device = next(encoder.parameters()).device
    return share_rows(
        rows, lambda own: torch.cat([encoder(x).embedding.float().cpu() for x in batches(data, own, device)]).numpy()
    )


def knn_monitor(encoder: StagedResNet, data: MedicalImages, most: int = 500) -> float:
    """Macro AUC on validation of a vote of the 20 nearest training images by cosine distance; no training is needed.

    The images are the same at every call, at most `most` of either split, and never test images.

    Returns:
        The mean over classes that some validation images show and some do not; NaN if there is none, or no training
        image has a label.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    train, val = (np.sort(rng.permutation(data.rows(split))[:most]) for split in ("train", "val"))
    truth = class_matrix(data, val)
    mixed = truth.any(axis=0) & ~truth.all(axis=0)
    if not mixed.any() or not len(train):
        return float("nan")
    model = NearestNeighbors(n_neighbors=min(20, len(train)), metric="cosine").fit(embed(encoder, data, train))
    neighbours = model.kneighbors(embed(encoder, data, val), return_distance=False)
    votes = class_matrix(data, train)[neighbours].mean(axis=1)  # (n, L)
    return float(roc_auc_score(truth[:, mixed], votes[:, mixed], average="macro"))
