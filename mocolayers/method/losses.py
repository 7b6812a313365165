"""The three losses: InfoNCE on embeddings, and two ways to bring the stages of two views together.

Plain functions and modules on tensors; nothing here knows about queues, optimisers or training.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.method.collectives import mean_over_processes, world_size


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of picking each query's own key out of the key and the queue.

    Args:
        q: (B, D) queries of unit length.
        k: (B, D) keys of unit length, row i belonging to query i; no gradient should flow into them.
        queue: (K, D) keys of earlier images, of unit length; K may be 0.
        temperature: positive number that divides every similarity.
    Returns:
        The mean loss, and the (B, 1 + K) logits with the positive in column 0.
    Source: He et al. 2020, equation 1 (1911.05722).
    """
    q = q / temperature  # far fewer numbers than logits
    positive = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    negative = q @ queue.T  # (B, K)
    logits = torch.cat([positive, negative], dim=1)  # (B, 1 + K)
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, target), logits


def pool_stage(stage: Tensor, side: int) -> Tensor:
    """Average-pool a feature map (B, C, H, W) to (B, C, side, side), as `adaptive_avg_pool2d` does.

    The gradients of torch's pooling, and of a mean over H and W, are in another order of memory than channels-last
    maps: on a processor they cost several times as much as the pooling.
    """
    if stage.shape[2:] == (side, side):
        return stage
    if side == 1:
        return stage.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)[..., None, None]
    return _Pool.apply(stage, side)


class _Pool(torch.autograd.Function):
    """torch's pooling with a gradient in channels-last order: two matrix products, one for each direction."""

    @staticmethod
    def forward(ctx, stage: Tensor, side: int) -> Tensor:
        ctx.shape, ctx.side = stage.shape, side
        return F.adaptive_avg_pool2d(stage, side)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (b, c, h, w), side = ctx.shape, ctx.side
        down, across, area = windows(h, w, side, gradient.dtype, gradient.device)
        g = gradient.permute(0, 2, 3, 1) / area  # (B, side, side, C)
        g = across.T @ g.reshape(b * side, side, c)
        g = down.T @ g.view(b, side, w * c)
        return g.view(b, h, w, c).permute(0, 3, 1, 2), None


@functools.cache
def windows(h: int, w: int, side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (side, H) and columns (side, W) in a window of adaptive pooling; pixels in each, (side, side, 1)."""
    across = [_windows(length, side).to(device, dtype) for length in (h, w)]
    return *across, torch.outer(*(each.sum(1) for each in across)).unsqueeze(2)


def _windows(length: int, count: int) -> Tensor:
    """(count, length) ones where a pixel of a line is in a window, else 0; windows may overlap."""
    start, pixel = torch.arange(count).unsqueeze(1) * length, torch.arange(length)
    return ((pixel >= start // count) & (pixel < -(-(start + length) // count))).float()


def stage_distance(u: Tensor, v: Tensor, scale_free: bool = False, standardized: bool = False) -> Tensor:
    """How far two pooled stages are apart.

    Args:
        u, v: (B, ...) pooled features of the two views.
        scale_free: compare directions only: every row is brought to unit length, and the squared distance of two
            rows, 2 - 2 cos, is averaged over the batch. Multiplying u and v by any gain then changes nothing.
        standardized: compare what varies from image to image only: every feature is brought to mean 0 and variance 1
            over the batch, and the mean of (u - v)^2 is then 2 - 2 times the mean correlation of a feature with itself
            in the other view. A feature that is alike in all images gains nothing.
    Returns:
        The mean of (u - v)^2 over all elements, or the scale-free or standardized distance, in [0, 4].
    """
    if standardized:
        return F.mse_loss(standardise(u.flatten(1)), standardise(v.flatten(1)))
    if not scale_free:
        return F.mse_loss(u, v)
    u, v = F.normalize(u.flatten(1), dim=1), F.normalize(v.flatten(1), dim=1)  # (B, C * side * side)
    return (u - v).square().sum(dim=1).mean()


class StageMSE(nn.Module):
    """Weighted sum over stages of the distance between the pooled stages of two views.

    Args:
        weights: one lambda per stage.
        pool: side of the average-pooled map per stage.
        scale_free, standardized: see `stage_distance`; the released loss is neither.

    Source: the MSE variant of Kaku, Upadhya and Razavian 2021 (2110.14805).
    """

    def __init__(
        self,
        channels: Sequence[int],
        pool: Sequence[int],
        scale_free: bool = False,
        standardized: bool = False,
    ) -> None:
        super().__init__()
        self.pool, self.scale_free, self.standardized = tuple(pool), scale_free, standardized

    def forward(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
        return [self.distance(u, v) for u, v in zip(query, key, strict=True)]

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """`stage_distance` of one pooled stage, as this loss measures it."""
        return stage_distance(u, v, self.scale_free, self.standardized)


def cross_correlation(z_u: Tensor, z_v: Tensor, eps: float = 1e-5) -> Tensor:
    """(D, D) correlations over the batch between the features of two views, (B, D) each.

    Source: Zbontar et al. 2021, equation 2 (2103.03230), with batch-norm's biased variance and epsilon.
    """
    return correlate(standardise(z_u, eps).T, standardise(z_v, eps).T)


def correlate(z_u: Tensor, z_v: Tensor) -> Tensor:
    """The same for features that are standardised and stand in rows: (..., D, B) each to (..., D, D)."""
    return mean_over_processes(z_u @ (z_v / z_v.shape[-1]).mT)


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 of every feature (B, D) over the batch, that of all processes together."""
    if world_size() == 1:
        return F.batch_norm(z, None, None, training=True, eps=eps)
    return standardise_rows(z.T, eps=eps).T


def standardise_rows(x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The same for features that stand in rows, (..., B); then times a gain and plus a bias (...), if there are any."""
    if world_size() == 1:  # a row is to batch-norm a channel of one image
        rows = x.reshape(1, -1, x.shape[-1])
        return F.batch_norm(rows, None, None, gain, bias, training=True, eps=eps).view(x.shape)
    centred = x - mean_over_processes(x.mean(dim=-1, keepdim=True))
    x = centred / (mean_over_processes(centred.square().mean(dim=-1, keepdim=True)) + eps).sqrt()
    return x if gain is None else x * gain.view(x.shape[:-1]).unsqueeze(-1) + bias.view(x.shape[:-1]).unsqueeze(-1)


def barlow_terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal part, sum_i (C_ii - 1)^2, and the off-diagonal part, sum_{i != j} C_ij^2, of each (..., D, D)."""
    diagonal = correlation.diagonal(dim1=-2, dim2=-1)
    on = (diagonal - 1).square().sum(dim=-1)
    off = correlation.square().sum(dim=(-2, -1)) - diagonal.square().sum(dim=-1)
    return on, off


class StageBarlow(nn.Module):
    """Weighted sum over stages of the distance from identity of the cross-correlation of projected stages.

    Each stage is averaged over its map, projected by its own multilayer perceptron, standardised over the batch and
    correlated with the other view's. The projector learns from both views; the key encoder from neither.

    Args:
        channels: channels of each stage.
        weights: one lambda per stage.
        width: width of the projector, and so the side D of the cross-correlation matrix. The matrix has rank at
            most B - 1: with D far above the batch size B even identical views pay D^2/(B-1) - D off the diagonal.
        off_diagonal: weight w of the off-diagonal part; 1 as released, 0.0051 in Barlow Twins.
        scale: the factor s in front of both parts; 1/32 as released.

    Source: the Barlow variant of Kaku, Upadhya and Razavian 2021 (2110.14805), after Zbontar et al. (2103.03230).
    """

    def __init__(
        self,
        channels: Sequence[int],
        projector: int,
        off_diagonal: float = 1.0,
        scale: float = 1 / 32,
    ) -> None:
        super().__init__()
        self.pool, self.off_diagonal, self.scale = (1,) * len(channels), off_diagonal, scale
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(count, projector, bias=False),
                nn.BatchNorm1d(projector),
                nn.ReLU(),
                nn.Linear(projector, projector, bias=False),
                nn.BatchNorm1d(projector),
                nn.ReLU(),
                nn.Linear(projector, projector, bias=False),
            )
            for count in channels
        )

    def forward(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
        losses = []
        for project, u, v in zip(self.projectors, query, key, strict=True):
            on, off = barlow_terms(cross_correlation(project(u.flatten(1)), project(v.flatten(1))))
            losses.append(self.scale * (on + self.off_diagonal * off))
        return losses
