"""`MoCo`: a query encoder, its slowly moving key encoder and a queue of keys, with an optional loss on the stages."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.method.collectives import gather, own_part, world_size
from mocolayers.method.encoder import Encoded, StagedResNet
from mocolayers.method.losses import StageBarlow, StageMSE, info_nce, pool_stage
from mocolayers.recipe import Recipe
from mocolayers.runtime import keep_freed_memory

POOLED = (1,) * 4  # sides that the stages are pooled to where no stage loss asks for more


class MoCoOutput(NamedTuple):
    """What one forward pass returns for a batch of B pairs and a queue that holds K keys.

    Attributes:
        loss: the scalar to minimise, the sum of `terms`.
        terms: "info_nce", and "stage1" ... "stage4" where a stage loss is on; weighted scalars.
        logits: (B, 1 + K), the positive in column 0.
        q, k: (B, D) unit-length queries and keys.
        query_stages, key_stages: four feature maps each, pooled as the stage loss pools them or else averaged,
            (B, C_l, side_l, side_l); rows in the order of the batch. An empty list if nobody was to look.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor
    q: Tensor
    k: Tensor
    query_stages: list[Tensor]
    key_stages: list[Tensor]


class MoCo(nn.Module):
    """Momentum contrast with intermediate-layer losses.

    The key encoder is a moving average of the query encoder's *parameters*. Its batch-norm buffers (running means and
    variances) are its own: they follow the keys it really saw, because a running mean averaged over old and
    new weights would fit neither. They are never used while training.

    The queue starts empty and only what was put there is used, so early losses are not made easy by random negatives.
    Any batch size goes with any queue length; a batch longer than the queue leaves its last keys there.

    Args:
        recipe: architecture, queue, momentum, temperature, bn_splits and the stage loss.

    Source: He et al. 2020 (1911.05722) and Chen et al. 2020 (2003.04297); stage losses Kaku et al. 2021 (2110.14805).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.temperature, self.momentum, self.bn_splits = recipe.temperature, recipe.momentum, recipe.bn_splits
        # The encoder is built first, so that every arm draws the same initial weights from the same seed.
        self.encoder_q, self.encoder_k = build_encoder(recipe), build_encoder(recipe)
        dim = self.encoder_q.dim
        self.head_q, self.head_k = build_head(recipe, dim), build_head(recipe, dim)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.head_k.load_state_dict(self.head_q.state_dict())
        for parameter in [*self.encoder_k.parameters(), *self.head_k.parameters()]:
            parameter.requires_grad_(False)
        self.stage_weights = recipe.stage_weights
        self.stage_loss = build_stage_loss(recipe, self.encoder_q.stage_channels)
        self.register_buffer("queue", torch.zeros(recipe.queue, recipe.dim))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        x_q: Tensor,
        x_k: Tensor,
        generator: torch.Generator | None = None,
        stage_share: float = 1.0,
        watched: bool = True,
    ) -> MoCoOutput:
        """Loss of a batch of pairs; also moves the key encoder and, at the end, puts the new keys into the queue.

        Args:
            x_q, x_k: (B, C, H, W) two views of the same B images: in distributed training, this process's part of
                the batch. The output is of the same rows; the queue takes the keys of all.
            generator: for the shuffle of the keys; only needed when bn_splits > 1, or in distributed training.
            stage_share: part of the stage losses' weights, below 1 while they warm up.
            watched: the output has the stages even if no loss looks at them.
        """
        sides = getattr(self.stage_loss, "pool", POOLED) if watched or self.stage_loss else ()
        query = self._encode(self.encoder_q, x_q, sides)
        q = F.normalize(self.head_q(query.embedding).float(), dim=1)  # (B, D)
        with torch.no_grad():
            self.momentum_update()
            key_stages, embedding = self._encode_shuffled(x_k, generator, sides)
            keys = F.normalize(self.head_k(embedding).float(), dim=1)  # (B of all processes, D)
            k = keys[own_part(len(keys))]  # (B, D)
        loss, logits = info_nce(q, k, self.queue[: int(self.filled)], self.temperature)
        terms = {"info_nce": loss}
        if self.stage_loss is not None:
            for number, term in enumerate(self.stage_loss(query.stages, key_stages), start=1):
                terms[f"stage{number}"] = stage_share * self.stage_weights[number - 1] * term
        self.enqueue(keys)
        return MoCoOutput(sum(terms.values()), terms, logits, q, k, query.stages, key_stages)

    @torch.no_grad()
    def momentum_update(self) -> None:
        """key <- m * key + (1 - m) * query, parameters only."""
        key = [*self.encoder_k.parameters(), *self.head_k.parameters()]
        query = [*self.encoder_q.parameters(), *self.head_q.parameters()]
        follow(key, query, self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (B, D) over the oldest ones, going round at the end of the queue.

        The queue is replaced, not changed in place: this step's logits still need the old one for their gradient.
        """
        length = len(self.queue)
        keys = keys[-length:] if length else keys[:0]
        if not len(keys):
            return
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % length
        queue = self.queue.clone()
        queue[places] = keys.to(queue.dtype)
        self.queue = queue
        self.pointer.copy_((self.pointer + len(keys)) % length)
        self.filled.copy_((self.filled + len(keys)).clamp(max=length))

    def _encode(self, encoder: StagedResNet, x: Tensor, sides: Sequence[int] = POOLED) -> Encoded:
        """Encode in groups, each with batch-norm statistics of its own: bn_splits in all, at least one a process.

        The stages come pooled to these sides, or not at all if there are none: whole maps are slow to put together and
        in order, and nothing looks at them.
        """
        groups = [_pooled(encoder(group), sides) for group in x.chunk(max(1, self.bn_splits // world_size()))]
        stages = [torch.cat(maps) for maps in zip(*(group.stages for group in groups), strict=True)]
        return Encoded(stages, torch.cat([group.embedding for group in groups]))

    def _encode_shuffled(self, x: Tensor, generator: torch.Generator | None, sides: Sequence[int] = POOLED) -> Encoded:
        """Encode keys in another grouping than the queries, so that batch statistics do not give the pairs away.

        Embedding *and* stages are put back in order; with only the embedding in order the stage losses would compare
        unrelated images. Returned are the stages of this process's rows, and the embeddings of all.
        """
        if self.bn_splits == 1 and world_size() == 1:
            return self._encode(self.encoder_k, x, sides)
        x = gather(x)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        back, mine = order.argsort(), own_part(len(x))
        key = self._encode(self.encoder_k, x[order[mine]], sides)
        return Encoded([gather(stage)[back[mine]] for stage in key.stages], gather(key.embedding)[back])


def _pooled(encoded: Encoded, sides: Sequence[int]) -> Encoded:
    stages = [pool_stage(s, min(side, s.shape[2])) for s, side in zip(encoded.stages, sides, strict=False)]
    return Encoded(stages, encoded.embedding)


def follow(key: list[Tensor], query: list[Tensor], momentum: float) -> None:
    """key <- m * key + (1 - m) * query, in place."""
    torch._foreach_lerp_(key, query, 1 - momentum)


def build_encoder(recipe: Recipe) -> StagedResNet:
    """The encoder a recipe asks for, with weights from torch's current random state."""
    keep_freed_memory()
    return StagedResNet(recipe.layout, recipe.width, recipe.stem, recipe.channels, recipe.zero_init_residual)


def build_head(recipe: Recipe, dim: int) -> nn.Module:
    """The map from the embedding (B, dim) to the space where queries and keys are compared (B, recipe.dim)."""
    if recipe.head == "linear":
        return nn.Linear(dim, recipe.dim)
    if recipe.head == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, recipe.dim))
    raise ValueError(f"head {recipe.head!r}: choose 'linear' or 'mlp'")


def build_stage_loss(recipe: Recipe, channels: list[int]) -> StageMSE | StageBarlow | None:
    """The loss on the stages a recipe asks for; None for plain MoCo."""
    if recipe.stage_loss == "none":
        return None
    if recipe.stage_loss == "mse":
        return StageMSE(channels, recipe.pool, recipe.scale_free, recipe.standardized)
    if recipe.stage_loss == "barlow":
        return StageBarlow(channels, recipe.projector, recipe.off_diagonal, recipe.scale)
    raise ValueError(f"stage_loss {recipe.stage_loss!r}: choose 'none', 'mse' or 'barlow'")
