"""An arm of the study's own: each stage tells an image's other view from the other images of the batch.

It uses nothing but what CONTRIBUTING.md offers for a loss of one's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StageContrast(nn.Module):
    """InfoNCE on every stage, with the other keys of the batch as negatives; of several processes, of their own part.

    Args:
        channels: channels of each stage.
        width: numbers to which a perceptron brings a stage before two views are compared.
        temperature: divides every cosine.
    Source: contrast on several stages, as in DetCo (2102.04803) and Contrastive Deep Supervision (2207.05306).
    """

    def __init__(self, channels: Sequence[int], width: int = 64, temperature: float = 0.2) -> None:
        super().__init__()
        self.pool, self.temperature = (1,) * len(channels), temperature
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(count, count), nn.ReLU(), nn.Linear(count, width)) for count in channels
        )

    def forward(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
        """The unweighted loss of each stage; the projector learns from the query alone."""
        return [self._contrast(*stage) for stage in zip(self.projectors, query, key, strict=True)]

    def _contrast(self, project: nn.Module, query: Tensor, key: Tensor) -> Tensor:
        q = F.normalize(project(query.flatten(1)).float(), dim=1)  # (B, width)
        with torch.no_grad():
            k = F.normalize(project(key.flatten(1)).float(), dim=1)
        logits = q @ k.T / self.temperature  # (B, B), an image's own key on the diagonal
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


ARM = {"stage_loss": StageContrast, "stage_weights": (1.0,) * 4, "stage_options": {"width": 64, "temperature": 0.2}}
