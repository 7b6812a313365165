"""What to watch while MoCo trains: is it learning, has it collapsed, and what does each loss term really do?"""

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
def measurements(output: MoCoOutput) -> dict[str, Tensor]:
    """What the output of a step tells, as scalars.

    Returns:
        The loss and its terms; `contrastive_accuracy`, the share of queries whose own key beats every key of the queue;
        `embedding_std` and `effective_rank` of the queries, which say whether they have collapsed: the rank is exp of
        the entropy of the normalised singular values of centred queries (Roy and Vetterli 2007), 1 at worst; and per
        stage, on averages over its map, raw MSE, scale-free distance, feature norm, and mean cross-correlations.
        (The loss's `pool` averages it first; places that two of its cells share count twice.)
    """
    values = torch.linalg.svdvals(output.q - output.q.mean(dim=0))
    share = values / values.sum().clamp_min(1e-12)
    row = {"loss": output.loss, **output.terms}
    row["contrastive_accuracy"] = (output.logits[:, 1:] < output.logits[:, :1]).all(dim=1).float().mean()
    row["embedding_std"] = output.q.std(dim=0).mean()
    row["effective_rank"] = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    for number, (u, v) in enumerate(zip(output.query_stages, output.key_stages, strict=True), start=1):
        u, v = u.mean(dim=(2, 3)), v.mean(dim=(2, 3))  # (B, C_l)
        c = cross_correlation(u, v)
        diagonal = c.diagonal()
        row[f"stage{number}_mse"] = stage_distance(u, v)
        row[f"stage{number}_scale_free"] = stage_distance(u, v, scale_free=True)
        row[f"stage{number}_norm"] = u.norm(dim=1).mean()
        row[f"stage{number}_diagonal"] = diagonal.mean()
        row[f"stage{number}_off_diagonal"] = (c.abs().sum() - diagonal.abs().sum()) / max(1, c.numel() - len(c))
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
    device = next(encoder.eval().parameters()).device

    def embed(rows: np.ndarray) -> np.ndarray:
        return torch.cat([encoder(x).embedding.float().cpu() for x in batches(data, rows, device)]).numpy()

    model = NearestNeighbors(n_neighbors=min(20, len(train)), metric="cosine").fit(share_rows(train, embed))
    neighbours = model.kneighbors(share_rows(val, embed), return_distance=False)
    votes = class_matrix(data, train)[neighbours].mean(axis=1)  # (n, L)
    return float(roc_auc_score(truth[:, mixed], votes[:, mixed], average="macro"))
