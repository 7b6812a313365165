"""The loss lab: what each loss on the stages rewards, found by hand."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import TwoViews
from mocolayers.labs.panel import Answer, Lab, choice, power_slider, quick_figure, slider, steps_slider
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import StageBarlow, StageMSE, barlow_terms, correlate, cross_correlation, pool_stage
from mocolayers.notebook.figures import STAGE_COLOURS
from mocolayers.recipe import Recipe
from mocolayers.runtime import step_generator

IDEAL = "Barlow, ideal projector (synthetic)"
LOSSES = ("raw MSE", "scale-free MSE", "Barlow", IDEAL)
POOL = (4, 4, 1, 1)
SCALE = 1 / 32  # s, as released
SHOWN = 64  # features in the heat map
MOST = 128  # images, the lesson's batch


class Stages(NamedTuple):
    """Stages of one view of some images, and of the images themselves seen again.

    Attributes:
        query: four (N, C_l, p_l, p_l) pooled maps of view q.
        stranger: the same of other images, row by row.
        second: the same of view k of the same images.
        pull: four (N,) squared norms of the gradient of each image's InfoNCE on the stage's whole map.
        cell: how many places of the map are averaged into one of the pooled map, stage by stage.
    """

    query: list[Tensor]
    stranger: list[Tensor]
    second: list[Tensor]
    pull: list[Tensor]
    cell: list[float]


def stages_of(encoder: StagedResNet, data: MedicalImages, recipe: Recipe) -> Stages:
    """Encode two views of `MOST` training images, and let InfoNCE pull on the stages.

    Args:
        encoder: in evaluation mode.
        data: the images.
        recipe: its views, seed and temperature.
    """
    rows = np.sort(np.random.default_rng(recipe.seed).permutation(data.rows("train"))[:MOST])
    x_q, x_k = TwoViews(recipe.views)(torch.from_numpy(data.images[rows]), step_generator(recipe.seed, 0))
    with torch.no_grad():
        key = encoder(x_k)
    query = encoder(x_q)
    q, k = F.normalize(query.embedding, dim=1), F.normalize(key.embedding, dim=1)
    # The other images' keys are the queue, so the own key of row i is column i.
    loss = F.cross_entropy(q @ k.T / recipe.temperature, torch.arange(len(q)), reduction="sum")
    gradients = torch.autograd.grad(loss, query.stages)
    pooled = [[pool_stage(s.detach(), p) for s, p in zip(e.stages, POOL, strict=True)] for e in (query, key)]
    stranger = [s.roll(1, dims=0) for s in pooled[0]]
    pull = [g.square().flatten(1).sum(dim=1) for g in gradients]
    cell = [g.shape[2] * g.shape[3] / side**2 for g, side in zip(gradients, POOL, strict=True)]
    return Stages(pooled[0], stranger, pooled[1], pull, cell)


class Losses(NamedTuple):
    """What the lab shows.

    Attributes:
        terms: (4,) weighted loss of each stage.
        floor: (4,) the same if both views were identical.
        unrelated: (4,) the same if the second view were of other images.
        correlation: (D, D) of the chosen stage: its projected features with Barlow, else its channels.
        agreement: mean diagonal of it.
        shares: (4,) the stage term's share of the gradient on that stage's output, InfoNCE having the rest.
        norm: mean norm of the last stage.
    """

    terms: np.ndarray
    floor: np.ndarray
    unrelated: np.ndarray
    correlation: np.ndarray
    agreement: float
    shares: np.ndarray
    norm: float


def second_view(stages: Stages, similarity: float, batch: int) -> list[Tensor]:
    """Stages of an imagined second view: 1 is the same view again, 0 another image, in between a correlation.

    With strangers w and the mean c of each feature, v = c + s (u - c) + sqrt(1 - s^2) (w - c) keeps every variance.
    """
    views = []
    for u, w in zip(stages.query, stages.stranger, strict=True):
        u, w = u[:batch], w[:batch]
        c = u.mean(dim=0)
        views.append(c + similarity * (u - c) + (1 - similarity**2) ** 0.5 * (w - c))
    return views


@lru_cache(maxsize=8)
def _barlow(channels: tuple[int, ...], width: int) -> StageBarlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StageBarlow(channels, (1.0,) * 4, width, scale=SCALE).requires_grad_(False)


def compute(
    stages: Stages,
    loss: str,
    weights: tuple[float, ...],
    similarity: float,
    batch: int,
    gain: float,
    width: int,
    off_diagonal: float,
    stage: int,
) -> Losses:
    """One setting of the lab.

    Args:
        loss: one of `LOSSES`; the ideal projector's outputs are independent normal numbers, so that nothing but the
            rank of the matrix stands between identical views and a loss of zero.
        weights: lambda of each stage.
        similarity: see `second_view`.
        batch: images B used, the first ones.
        gain: factor on all features of both views.
        width, off_diagonal: projector width D and weight w, for Barlow.
        stage: 1 to 4, whose correlation is returned.
    """
    if loss == IDEAL:
        return _ideal(weights, similarity, batch, width, off_diagonal)
    u = [(gain * s[:batch]).requires_grad_(True) for s in stages.query]
    others = ([gain * s for s in second_view(stages, similarity, batch)], [gain * s[:batch] for s in stages.stranger])
    if loss == "Barlow":
        module = _barlow(tuple(s.shape[1] for s in u), width)
        module.weights, module.off_diagonal = weights, off_diagonal
        compare, (own, second, stranger) = module.compare, module.project(u, *others)
        correlation = correlate(own[stage - 1], second[stage - 1])
    else:
        compare, own, (second, stranger) = StageMSE(weights, POOL, scale_free=loss != "raw MSE"), u, others
        correlation = cross_correlation(*(s[stage - 1].mean(dim=(2, 3)) for s in (u, second)))
    terms = compare(own, second)
    with torch.no_grad():
        floor, unrelated = compare(own, own), compare(own, stranger)
    gradients = torch.autograd.grad(sum(terms), u)
    # From the scaled, pooled map back to the network's own: times the gain, spread over the places of each cell.
    pulls = [gain * g.norm().item() / cell**0.5 for g, cell in zip(gradients, stages.cell, strict=True)]
    nce = [pull[:batch].sum().item() ** 0.5 / batch for pull in stages.pull]
    shares = [own / max(own + other, 1e-12) for own, other in zip(pulls, nce, strict=True)]
    norm = u[3].detach().mean(dim=(2, 3)).norm(dim=1).mean().item()
    values = [np.array([t.item() for t in part]) for part in (terms, floor, unrelated)]
    correlation = correlation.detach()
    return Losses(*values, correlation.numpy(), correlation.diagonal().mean().item(), np.array(shares), norm)


def _ideal(weights: tuple[float, ...], similarity: float, batch: int, width: int, off_diagonal: float) -> Losses:
    """The Barlow loss of projector outputs that are independent of each other; without a network, nothing pulls."""
    z, stranger = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(0))
    seconds = (similarity * z + (1 - similarity**2) ** 0.5 * stranger, z, stranger)
    matrices = [cross_correlation(z, v) for v in seconds]
    parts = [barlow_terms(c) for c in matrices]
    values = [np.array(weights) * SCALE * (on + off_diagonal * off).item() for on, off in parts]
    agreement = matrices[0].diagonal().mean().item()
    return Losses(*values, matrices[0].numpy(), agreement, np.full(4, np.nan), float("nan"))


def rank_floor(width: int, batch: int) -> float:
    """What identical views pay at least off the diagonal, before any weight: D^2 / (B - 1) - D, or 0."""
    return max(width**2 / (batch - 1) - width, 0.0)


def worth(floor: float, most: float) -> str:
    """How much less identical views pay than unrelated images; they may pay more."""
    if floor > most:
        return f"nothing: it costs {floor / max(most, 1e-12):.1f} times as much"
    return f"{1 - floor / max(most, 1e-12):.0%} of it"


def draw_losses(found: Losses, stage: int):
    """Loss per stage with its floor, the correlation matrix, and who pulls."""
    figure, axes = quick_figure(3, (9.6, 3.3))
    x = np.arange(4)
    axes[0].bar(x, found.terms, color=STAGE_COLOURS, label="loss")
    axes[0].hlines(found.floor, x - 0.45, x + 0.45, color="black", linewidth=2, label="identical views pay")
    axes[0].set_xticks(x, ["1", "2", "3", "4"])
    axes[0].set(xlabel="stage", title="loss per stage")
    axes[0].margins(y=0.3)
    axes[0].legend(fontsize=8)
    axes[1].imshow(found.correlation[:SHOWN, :SHOWN], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes[1].set(title=f"correlation, stage {stage}", xlabel="feature of view k", ylabel="feature of view q")
    axes[2].barh(x, found.shares, color=STAGE_COLOURS)
    axes[2].barh(x, 1 - found.shares, left=found.shares, color="#0072B2")
    axes[2].set_yticks(x, ["1", "2", "3", "4"])
    axes[2].invert_yaxis()
    axes[2].set(xlim=(0, 1), xlabel="stage term | InfoNCE (blue)", title="who pulls?")
    return figure


def loss_lab(stages: Stages) -> Lab:
    """Sliders for everything that a loss on the stages depends on."""
    real = [
        cross_correlation(u.mean(dim=(2, 3)), v.mean(dim=(2, 3)))
        for u, v in zip(stages.query, stages.second, strict=True)
    ]
    seen = ", ".join(f"{c.diagonal().mean():.2f}" for c in real)

    def answer(loss, weight, similarity, batch, gain, width, off_diagonal, stage, **relative) -> Answer:
        weights = tuple(weight * part for part in relative.values())
        setting = (loss, weights, similarity, batch, gain, width, off_diagonal, stage)
        found = compute(stages, *setting)
        total, floor, most = found.terms.sum(), found.floor.sum(), found.unrelated.sum()
        numbers = {
            "loss, all stages": f"{total:.3g}",
            "identical views would pay": f"{floor:.3g}",
            "unrelated images would pay": f"{most:.3g}",
            "agreement can save": worth(floor, most),
            f"mean diagonal of C, stage {stage}": f"{found.agreement:.2f}",
            "real views agree, stage by stage": seen,
            "norm of stage 4": f"{found.norm:.3g}",
        }
        if "Barlow" in loss:
            numbers["floor by rank, D²/(B-1) - D"] = f"{rank_floor(width, batch):.0f}"
        alt = f"Bars of the loss ({loss}) per stage, {SHOWN} by {SHOWN} correlations, and gradient shares per stage."
        return Answer(draw_losses(found, stage), alt, numbers)

    sizes = [n for n in (8, 16, 32, 64, MOST) if n <= len(stages.query[0])]
    controls = {
        "loss": choice("loss", LOSSES),
        "similarity": slider("views alike", 0.6, 0, 1, 0.05),
        "gain": power_slider("feature scale", 1.0, -2, 1),
        "batch": steps_slider("batch B", sizes[-1], sizes),
        "width": steps_slider("projector D", 128, [16, 32, 64, 128, 256]),
        "off_diagonal": power_slider("off-diagonal w", 1.0, -3, 0),
        "weight": power_slider("weight λ", 0.1, -5, 2),
        **{f"stage{s}": slider(f"stage {s} (× λ)", 1.0, 0, 1, 0.25) for s in (1, 2, 3, 4)},
        "stage": steps_slider("matrix of stage", 4, [1, 2, 3, 4]),
    }
    return Lab(controls, answer, "What does this loss really reward?")
