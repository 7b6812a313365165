"""What to watch while MoCo trains: is it learning, has it collapsed, and what does each loss term really do?"""

import numpy as np
import torch
from torch import Tensor

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.method.collectives import mean_over_processes
from mocolayers.method.losses import cross_correlation, stage_distance
from mocolayers.method.moco import MoCoOutput


@torch.no_grad()
def contrastive_accuracy(logits: Tensor) -> float:
    """Share of queries whose own key beats every key of the queue; logits (B, 1 + K), positive first."""
    return (logits.argmax(dim=1) == 0).float().mean().item()


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features (B, D): 1 means collapsed.

    Source: Roy and Vetterli 2007, on the centred matrix.
    """
    values = torch.linalg.svdvals((z - z.mean(dim=0)).float())
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item()


@torch.no_grad()
def stage_statistics(output: MoCoOutput) -> dict[str, float]:
    """Per stage, on averages over its map as the model pooled it: raw MSE, scale-free distance, feature norm,
    cross-correlation means.
    """
    row = {}
    for number, (u, v) in enumerate(zip(output.query_stages, output.key_stages, strict=True), start=1):
        u, v = u.float().mean(dim=(2, 3)), v.float().mean(dim=(2, 3))  # (B, C_l)
        c = cross_correlation(u, v)
        diagonal = c.diagonal()
        off = (c.abs().sum() - diagonal.abs().sum()) / max(1, c.numel() - len(c))
        row |= {
            f"stage{number}_mse": stage_distance(u, v).item(),
            f"stage{number}_scale_free": stage_distance(u, v, scale_free=True).item(),
            f"stage{number}_norm": u.norm(dim=1).mean().item(),
            f"stage{number}_diagonal": diagonal.mean().item(),
            f"stage{number}_off_diagonal": off.item(),
        }
    return row


def gradient_shares(output: MoCoOutput, parameters: list[Tensor]) -> dict[str, float]:
    """Each loss term's share of the summed gradient norms on the query encoder; the shares add up to 1."""
    norms = {}
    for name, term in output.terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        whole = [mean_over_processes(g.float()) for g in gradients if g is not None]
        norms[name] = sum(g.square().sum() for g in whole) ** 0.5
    total = max(float(sum(norms.values())), 1e-12)
    return {f"gradient_{name}": float(norm) / total for name, norm in norms.items()}


def knn_auc(
    train: np.ndarray, train_classes: np.ndarray, held_out: np.ndarray, classes: np.ndarray, k: int = 20
) -> float:
    """Macro AUC of a k-nearest-neighbour vote by cosine distance; no training, so it can be asked often.

    Args:
        train, held_out: (n, D) and (m, D) features.
        train_classes, classes: (n, L) and (m, L) booleans, see `class_matrix`.
    Returns:
        The mean AUC over classes that have both kinds in `classes`; NaN if there is none.
    """
    # Half a second to import, which whoever only builds a model need not wait for.
    from sklearn.neighbors import KNeighborsClassifier

    from mocolayers.evaluation.scores import macro_auc

    model = KNeighborsClassifier(n_neighbors=min(k, len(train)), metric="cosine")
    neighbours = model.fit(train, np.zeros(len(train))).kneighbors(held_out, return_distance=False)
    return float(macro_auc(classes, train_classes[neighbours].mean(axis=1))[0])


def knn_rows(data: MedicalImages, most: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """A fixed draw of at most `most` training rows and as many validation rows."""
    rng = np.random.default_rng(0)
    train, val = (rng.permutation(data.rows(split))[:most] for split in ("train", "val"))
    return np.sort(train), np.sort(val)


def knn_monitor(encode, data: MedicalImages) -> float:
    """kNN AUC on validation of an `encode(rows) -> (n, D)` function; validation only, never test."""
    train, val = knn_rows(data)
    if not len(val):
        return float("nan")
    return knn_auc(encode(train), class_matrix(data, train), encode(val), class_matrix(data, val))
