"""The losses: InfoNCE on embeddings, and two ways to bring the stages of two views together.

A stage loss is a module built as `Class(channels, **options)`. `MoCo` pools each stage to the sides in its attribute
`pool`, and `forward(query, key)` returns one unweighted loss per stage from these fp32 maps (B, C_l, side, side); the
key's have no gradient. It runs under the caller's autocast, which rounds matrix products only.
"""

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
    with torch.autocast(q.device.type, enabled=False):
        negative = q @ queue.T  # (B, K)
    logits = torch.cat([positive, negative], dim=1)  # (B, 1 + K)
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, target), logits


def pool_stage(stage: Tensor, side: int) -> Tensor:
    """Average-pool a feature map (B, C, H, W) to fp32 (B, C, side, side), at most its own size.

    The gradient of torch's mean over H and W is not in the channels-last order of the maps, which makes a step slower.
    """
    h, w = stage.shape[2:]
    if side > min(h, w):  # torch would repeat pixels
        raise ValueError(f"a stage of {h} x {w} cannot be pooled to {side} x {side}: make its pool smaller")
    if side == 1:
        return stage.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)[..., None, None].float()
    return F.adaptive_avg_pool2d(stage, side).float()


def stage_distance(u: Tensor, v: Tensor, scale_free: bool = False, standardized: bool = False) -> Tensor:
    """How far two pooled stages are apart.

    Args:
        u, v: (B, ...) pooled features of the two views.
        scale_free: the mean over the batch of the squared distance of rows of unit length, 2 - 2 cos; any gain on u
            and v changes nothing.
        standardized: the same mean of (u - v)^2 of features of mean 0 and variance 1 over the batch, 2 - 2 times their
            mean correlation; what all images share is taken off. (A feature that is equal in all images costs 0.)
    Returns:
        The mean of (u - v)^2 over all elements, or the scale-free or standardized distance, in [0, 4].
    """
    u, v = u.movedim(1, -1), v.movedim(1, -1)  # the order in memory: gradients come back in it
    if standardized:
        return F.mse_loss(standardise(u.flatten(1)), standardise(v.flatten(1)))
    if not scale_free:
        return F.mse_loss(u, v)
    u, v = F.normalize(u.flatten(1), dim=1), F.normalize(v.flatten(1), dim=1)  # (B, C * side * side)
    return (u - v).square().sum(dim=1).mean()


class StageMSE(nn.Module):
    """The distance between the pooled stages of two views.

    Args:
        channels: channels of each stage; not used.
        pool: side of the average-pooled map per stage.
        scale_free, standardized: see `stage_distance`; the released loss is neither.

    Source: the MSE variant of Kaku, Upadhya and Razavian 2021 (2110.14805).
    """

    def __init__(
        self, channels: Sequence[int], pool: Sequence[int], scale_free: bool = False, standardized: bool = False
    ) -> None:
        super().__init__()
        self.pool, self.scale_free, self.standardized = tuple(pool), scale_free, standardized

    def forward(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
        """The unweighted loss of each stage."""
        pairs = zip(query, key, strict=True)
        return [stage_distance(u, v, self.scale_free, self.standardized) for u, v in pairs]


def standardise(z: Tensor, eps: float = 1e-5, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Mean 0, variance 1 of features (B, D) or (1, D, B) over the batch of all processes; then gain and bias (D)."""
    if world_size() == 1:
        return F.batch_norm(z, None, None, gain, bias, training=True, eps=eps)
    over, shape = [0, *range(2, z.ndim)], (-1, *[1] * (z.ndim - 2))
    centred = z - mean_over_processes(z.mean(over, keepdim=True))
    z = centred / (mean_over_processes(centred.square().mean(over, keepdim=True)) + eps).sqrt()
    return z if gain is None else z * gain.view(shape) + bias.view(shape)


def standardise_rows(z: Tensor, eps: float = 1e-5, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`standardise` features (..., B), each in its row; on a processor, Barlow's products are fastest so."""
    return standardise(z.reshape(1, -1, z.shape[-1]), eps, gain, bias).view(z.shape)


def cross_correlation(z_u: Tensor, z_v: Tensor, eps: float = 1e-5) -> Tensor:
    """(D, D) correlations over the batch between the features of two views, (B, D) each, in fp32.

    Source: Zbontar et al. 2021, equation 2 (2103.03230), with batch-norm's biased variance and epsilon.
    """
    return correlations(torch.stack([z_u.T, z_v.T], dim=1).float(), eps)


def correlations(z: Tensor, eps: float = 1e-5) -> Tensor:
    """`cross_correlation` (..., D, D) of two views of features in rows, (..., D, 2, B) fp32."""
    z_u, z_v = standardise_rows(z, eps).unbind(dim=-2)
    with torch.autocast(z.device.type, enabled=False):
        return mean_over_processes(z_u @ z_v.mT / z.shape[-1])


def barlow_terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal part, sum_i (C_ii - 1)^2, and the off-diagonal one, sum_{i != j} C_ij^2, of (..., D, D) matrices."""
    diagonal = correlation.diagonal(dim1=-2, dim2=-1)
    return (diagonal - 1).square().sum(-1), correlation.square().sum((-2, -1)) - diagonal.square().sum(-1)


def barlow_terms_of_few(z: Tensor) -> tuple[Tensor, Tensor]:
    """`barlow_terms` of the `correlations` of (..., D, 2, B), faster where B is far below D: C is never made.

    C = Z_u Z_v^T / B: its C_ij^2 sum to what the products of the elements of Z_u^T Z_u / B and Z_v^T Z_v / B sum to.
    """
    z_u, z_v = standardise_rows(z).unbind(dim=-2)
    diagonal = (z_u * z_v).mean(dim=-1)
    with torch.autocast(z.device.type, enabled=False):
        images_u, images_v = (view.mT @ view / z.shape[-1] for view in (z_u, z_v))  # (..., B, B)
    every = (images_u * images_v).sum((-2, -1))
    return (diagonal - 1).square().sum(-1), every - diagonal.square().sum(-1)


class StageBarlow(nn.Module):
    """The distance from identity of the cross-correlation of projected stages.

    The projector learns from both views. It keeps the caller's precision; the correlations are fp32.

    Args:
        channels: channels of each stage.
        projector: width of the projector, and so the side D of the cross-correlation matrix. The matrix has rank at
            most B - 1: with D far above the batch size B even identical views pay D^2/(B-1) - D off the diagonal.
        off_diagonal: weight w of the off-diagonal part; 1 as released, 0.0051 in Barlow Twins.
        scale: the factor s in front of both parts; 1/32 as released.

    Source: the Barlow variant of Kaku, Upadhya and Razavian 2021 (2110.14805), after Zbontar et al. (2103.03230).
    """

    def __init__(
        self, channels: Sequence[int], projector: int, off_diagonal: float = 1.0, scale: float = 1 / 32
    ) -> None:
        super().__init__()
        self.pool, self.off_diagonal, self.scale = (1,) * len(channels), off_diagonal, scale
        layers = [[nn.Linear(n, projector, bias=False) for n in (count, projector, projector)] for count in channels]
        first, *deeper = zip(*layers, strict=True)
        self.first = nn.ModuleList(first)
        # The other two of all stages (S, D, D): one product takes half the time of one a stage.
        self.deeper = nn.ParameterList(torch.stack([layer.weight.detach() for layer in each]) for each in deeper)
        # They hold gain and bias only: `project` normalises each view by itself.
        width = len(channels) * projector
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, track_running_stats=False) for _ in deeper)

    def forward(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> Sequence[Tensor]:
        """The unweighted loss of each stage."""
        z = self.project(query, key).float()
        few = 2 * z.shape[-1] < z.shape[1] and world_size() == 1  # several processes share C, not their images
        on, off = barlow_terms_of_few(z) if few else barlow_terms(correlations(z))
        return (self.scale * (on + self.off_diagonal * off)).unbind()

    def project(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
        """Features (S, D, 2, B) of S stages of both views: three linear layers, batch-norm and ReLU between them."""
        pairs = (torch.cat([u.flatten(1), v.flatten(1)]) for u, v in zip(query, key, strict=True))
        z = torch.stack([layer.weight @ pair.T for layer, pair in zip(self.first, pairs, strict=True)])  # (S, D, 2 B)
        for norm, weight in zip(self.norms, self.deeper, strict=True):
            affine = (each.repeat_interleave(2) for each in norm.parameters())  # the same for both views
            z = weight @ standardise_rows(z.unflatten(2, (2, -1)), norm.eps, *affine).relu().flatten(2)
        return z.unflatten(2, (2, -1))


STAGE_LOSSES = {"mse": StageMSE, "barlow": StageBarlow}
