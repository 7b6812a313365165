"""`MoCo`: a query encoder, its slowly moving key encoder and a queue of keys, with an optional loss on the stages."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.method.collectives import gather, own_part, world_size
from mocolayers.method.encoder import Encoded, StagedResNet
from mocolayers.method.losses import info_nce, pool_stage

AVERAGED = (1,) * 4  # sides that the stages are pooled to where no stage loss asks for more


class MoCoOutput(NamedTuple):
    """What one forward pass returns for a batch of B pairs and a queue that holds K keys."""

    loss: Tensor  # the sum of `terms`
    terms: dict[str, Tensor]  # "info_nce", and with a stage loss "stage1" ... "stage4"; weighted scalars
    logits: Tensor  # (B, 1 + K), the positive in column 0
    q: Tensor  # (B, D), of unit length
    k: Tensor  # (B, D), of unit length
    keys: Tensor  # k of all processes that train together, for `MoCo.enqueue`
    query_stages: list[Tensor]  # (B, C_l, side_l, side_l) fp32, pooled as the stage loss asks, else averaged; or empty
    key_stages: list[Tensor]  # the same, row by row of the same images


class MoCo(nn.Module):
    """Momentum contrast with intermediate-layer losses.

    The key encoder is a moving average of the query encoder's *parameters*. Its batch-norm buffers follow the keys it
    saw: means averaged over old and new weights would fit neither. They are not used while training.

    The queue starts empty, so early losses are not made easy by random negatives. Any batch size goes with any queue
    length; a batch longer than the queue leaves its last keys there.

    Args:
        base_encoder: makes an encoder; called twice, for queries and keys.
        stage_loss: makes the loss on the stages from their channels, see `losses`; None is plain MoCo.
        stage_weights: lambda of each stage.
        head: "linear" (as released) or "mlp" (MoCo v2) from the embedding to `dim` numbers.
        dim, queue: length of a key, and how many keys are kept.
        momentum: share of the key encoder that stays in every step.
        temperature: divides the similarities, see `info_nce`.
        bn_splits: groups into which a batch is cut for batch-norm, against the leak between query and key.

    Source: He et al. 2020 (1911.05722) and Chen et al. 2020 (2003.04297); stage losses Kaku et al. 2021 (2110.14805).
    """

    def __init__(
        self,
        base_encoder: Callable[[], StagedResNet],
        stage_loss: Callable[[list[int]], nn.Module] | None = None,
        stage_weights: Sequence[float] = (0.0,) * 4,
        head: str = "mlp",
        dim: int = 128,
        queue: int = 1024,
        momentum: float = 0.996,
        temperature: float = 0.1,
        bn_splits: int = 2,
    ) -> None:
        super().__init__()
        self.stage_weights, self.momentum, self.temperature = tuple(stage_weights), momentum, temperature
        self.bn_splits = bn_splits
        # The stage loss comes last, so that every arm starts from the same weights with the same seed.
        self.encoder_q, self.encoder_k = base_encoder(), base_encoder()
        self.head_q, self.head_k = (build_head(head, self.encoder_q.dim, dim) for _ in range(2))
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.head_k.load_state_dict(self.head_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.head_k.requires_grad_(False)
        self.stage_loss = stage_loss(self.encoder_q.stage_channels) if stage_loss else None
        self.register_buffer("queue", torch.zeros(queue, dim))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        x_q: Tensor,
        x_k: Tensor,
        order: Tensor | None = None,
        return_stages: bool = True,
        filled: int | None = None,
    ) -> MoCoOutput:
        """Loss of a batch of pairs; also moves the key encoder. `enqueue` the keys once the gradient is computed.

        Args:
            x_q, x_k: (B, C, H, W) two views of the same B images: in distributed training, this process's part of
                the batch. The output is of the same rows.
            order: permutation of the whole batch in which keys are cut into groups if bn_splits > 1, or in distributed
                training; None is a random one.
            return_stages: return the stages even when no loss uses them.
            filled: how many keys the queue holds; None asks the device, which has to finish its work to answer.
        Raises:
            ValueError: a batch-norm group of fewer than two images, or a stage smaller than the loss pools it to.
        """
        sides = self.stage_loss.pool if self.stage_loss is not None else AVERAGED if return_stages else ()
        query = self._encode(self.encoder_q, x_q, sides)
        q = F.normalize(self.head_q(query.embedding).float(), dim=1)  # (B, D)
        with torch.no_grad():
            self.momentum_update()
            key = self._encode_shuffled(x_k, order, sides)
            keys = F.normalize(self.head_k(key.embedding).float(), dim=1)  # (B of all processes, D)
        k = keys[own_part(len(keys))]  # (B, D)
        queue = self.queue[: int(self.filled) if filled is None else filled]
        loss, logits = info_nce(q, k, queue, self.temperature)
        terms = {"info_nce": loss}
        if self.stage_loss is not None:
            losses = self.stage_loss(query.stages, key.stages)
            for number, (weight, term) in enumerate(zip(self.stage_weights, losses, strict=True), start=1):
                terms[f"stage{number}"] = weight * term
        return MoCoOutput(sum(terms.values()), terms, logits, q, k, keys, query.stages, key.stages)

    @torch.no_grad()
    def momentum_update(self) -> None:
        """key <- m * key + (1 - m) * query, parameters only."""
        key = [*self.encoder_k.parameters(), *self.head_k.parameters()]
        query = [*self.encoder_q.parameters(), *self.head_q.parameters()]
        torch._foreach_lerp_(key, query, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (B, D) over the oldest ones, in place, going round at the end of the queue.

        Logits need the old queue for their gradient, so this comes after the backward pass.
        """
        length = len(self.queue)
        keys = keys[max(0, len(keys) - length) :]
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % length
        self.queue.index_copy_(0, places, keys)
        self.pointer.copy_((self.pointer + len(keys)) % length)
        self.filled.copy_((self.filled + len(keys)).clamp(max=length))

    def _encode(self, encoder: StagedResNet, x: Tensor, sides: Sequence[int]) -> Encoded:
        """Encode in groups, each with batch-norm statistics of its own: bn_splits in all, at least one a process.

        Only the pooled stages are kept, none if `sides` is empty: whole maps are slow to join and to reorder.
        """
        count = max(1, self.bn_splits // world_size())
        if len(x) < 2 * count:
            raise ValueError(
                f"a batch of {len(x)} in {count} batch-norm groups leaves groups of fewer than two images; "
                "take a larger batch or fewer bn_splits"
            )
        groups = []
        for group in x.tensor_split(count):  # sizes differ by one at most
            stages, embedding = encoder(group)
            pooled = [pool_stage(stage, side) for stage, side in zip(stages, sides, strict=False)]
            groups.append((embedding, *pooled))
        embedding, *stages = (torch.cat(parts) for parts in zip(*groups, strict=True))
        return Encoded(stages, embedding)

    def _encode_shuffled(self, x: Tensor, order: Tensor | None, sides: Sequence[int] = AVERAGED) -> Encoded:
        """Encode keys in other groups than the queries, so that batch statistics do not give the pairs away.

        Embedding *and* stages come back in order, or the stage losses would compare unrelated images: the stages of
        this process's rows, and the embeddings of all.
        """
        if self.bn_splits == 1 and world_size() == 1:
            return self._encode(self.encoder_k, x, sides)
        x = gather(x)
        order = torch.randperm(len(x), device=x.device) if order is None else order
        back, mine = order.argsort(), own_part(len(x))
        key = self._encode(self.encoder_k, x[order[mine]], sides)
        return Encoded([gather(stage)[back[mine]] for stage in key.stages], gather(key.embedding)[back])


def build_head(kind: str, channels: int, dim: int) -> nn.Module:
    """The map from the embedding (B, channels) to the space where queries and keys are compared (B, dim)."""
    if kind == "linear":
        return nn.Linear(channels, dim)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, dim))
    raise ValueError(f"head {kind!r}: choose 'linear' or 'mlp'")
