"""Other ways to write MoCo's training loop: lightly's, torchvision's transforms, and the released code's description.

All have the encoder, head, batch, queue, optimiser and precision of a recipe, take their images from memory, and differ
in how views are made and in what a step does. None of them cuts the batch into groups for batch-norm. lightly is
imported where it is used: it is not there on every machine.
"""

import copy
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mocolayers.data.prepared import MedicalImages
from mocolayers.method.moco import build_head
from mocolayers.recipe import Recipe
from mocolayers.training.runs import build_encoder


class Pairs(Dataset):
    """Images in memory, each as two views by a transform of one image."""

    def __init__(self, images: list, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int):
        return self.transform(self.images[row])


def lightly_pairs(data: MedicalImages) -> Pairs:
    """PIL images through the transform of lightly's MoCo example."""
    from lightly.transforms.moco_transform import MoCoV2Transform

    transform = MoCoV2Transform(input_size=data.side)
    images = [Image.fromarray(image.squeeze()).convert("RGB") for image in data.images]
    if data.channels == 3:
        return Pairs(images, lambda image: tuple(transform(image)))
    return Pairs(images, lambda image: tuple(view[:1] for view in transform(image)))


def torchvision_pairs(data: MedicalImages, recipe: Recipe) -> Pairs:
    """uint8 tensors through torchvision's transforms, as strong as the recipe's views of colour images."""
    views = recipe.views
    turn = [v2.RandomRotation(views.rotation)] if views.rotation else []
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    view = v2.Compose(
        [
            v2.RandomResizedCrop(data.side, scale=(views.crop, 1.0), antialias=True),
            *turn,
            v2.RandomHorizontalFlip(views.hflip),
            v2.RandomVerticalFlip(views.vflip),
            v2.RandomApply([jitter], views.jitter),
            v2.RandomGrayscale(views.gray),
            v2.RandomApply([v2.GaussianBlur(5, views.sigma)], views.blur),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    return Pairs(list(images), lambda image: (view(image), view(image)))


class Backbone(nn.Module):
    """A recipe's encoder that returns nothing but the embedding (B, D)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = build_encoder(recipe)
        self.dim = self.encoder.dim

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).embedding


def lightly_moco(recipe: Recipe) -> nn.Module:
    """The loop of lightly's MoCo example: https://docs.lightly.ai/self-supervised-learning/examples/moco.html"""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class LightlyMoCo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone(recipe)
            self.projection_head = MoCoProjectionHead(self.backbone.dim, self.backbone.dim, recipe.dim)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NTXentLoss(recipe.temperature, memory_bank_size=(recipe.queue, recipe.dim))

        def forward(self, x_q: Tensor, x_k: Tensor) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=recipe.momentum)
            update_momentum(self.projection_head, self.projection_head_momentum, m=recipe.momentum)
            query = self.projection_head(self.backbone(x_q))
            key = self.projection_head_momentum(self.backbone_momentum(x_k)).detach()
            return self.criterion(query, key)

    return LightlyMoCo()


class ReleasedMoCo(nn.Module):
    """The released loop, written from its description; with stages, hooks collect them for the MSE of pooled maps.

    The queue is written in place, and copied for each step's logits; keys are not shuffled.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        backbone = Backbone(recipe)
        self.encoder_q = nn.Sequential(backbone, build_head(recipe.head, backbone.dim, recipe.dim))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(recipe.dim, recipe.queue), dim=0))
        self.pointer, self.stages, self.pool = 0, {"q": [], "k": []}, recipe.stage_options.get("pool", ())
        if recipe.stage_loss == "mse":
            for name, encoder in (("q", self.encoder_q), ("k", self.encoder_k)):
                self._listen(encoder[0].encoder, self.stages[name])

    def forward(self, x_q: Tensor, x_k: Tensor) -> Tensor:
        for seen in self.stages.values():
            seen.clear()
        q = F.normalize(self.encoder_q(x_q).float(), dim=1)
        with torch.no_grad():
            for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                key.data = key.data * self.recipe.momentum + query.data * (1 - self.recipe.momentum)
            k = F.normalize(self.encoder_k(x_k).float(), dim=1)
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / self.recipe.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.queue[:, self.pointer : self.pointer + len(k)] = k.T
        self.pointer = (self.pointer + len(k)) % self.recipe.queue
        return loss + sum(self._stage_terms())

    def _stage_terms(self) -> list[Tensor]:
        together = zip(self.stages["q"], self.stages["k"], self.recipe.stage_weights, self.pool, strict=False)
        pool = F.adaptive_avg_pool2d
        return [weight * F.mse_loss(pool(u, side), pool(v, side)) for u, v, weight, side in together]

    @staticmethod
    def _listen(encoder: nn.Module, seen: list[Tensor]) -> None:
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
