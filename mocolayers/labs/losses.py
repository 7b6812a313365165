"""The loss lab: what each loss on the stages rewards, found by hand."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from ipywidgets import Dropdown, FloatLogSlider, FloatSlider, SelectionSlider
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import two_views
from mocolayers.labs.panel import Answer, Lab, quick_figure
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import StageBarlow, StageMSE, cross_correlation
from mocolayers.notebook.figures import STAGE_COLOURS
from mocolayers.recipe import Recipe
from mocolayers.runtime import step_generator

IDEAL = "Barlow, ideal projector (synthetic)"
LOSSES = ("raw MSE", "scale-free MSE", "Barlow", IDEAL)
POOL = (4, 4, 1, 1)
SCALE = 1 / 32  # s, as released
SHOWN = 64  # features in the heat map
MOST = 128  # images, the lesson's batch


def stages_of(encoder: StagedResNet, data: MedicalImages, recipe: Recipe) -> dict[str, list]:
    """Encode two views of `MOST` training images, and let InfoNCE pull on the stages.

    Returns:
        Four of each: `query` and `second` (N, C_l, p_l, p_l), pooled maps of both views; `stranger`: view q of other
        images, row by row; `pull` (N,): squared norms of the gradient of each image's InfoNCE on the stage's whole
        map; `cell`: how many places of the map are averaged into one of the pooled map.
    """
    rows = np.sort(np.random.default_rng(recipe.seed).permutation(data.rows("train"))[:MOST])
    x_q, x_k = two_views(torch.from_numpy(data.images[rows]), recipe.views, step_generator(recipe.seed, 0))
    with torch.no_grad():
        key = encoder(x_k)
    query = encoder(x_q)
    q, k = F.normalize(query.embedding, dim=1), F.normalize(key.embedding, dim=1)
    # The other images' keys are the queue, so the own key of row i is column i.
    loss = F.cross_entropy(q @ k.T / recipe.temperature, torch.arange(len(q)), reduction="sum")
    gradients = torch.autograd.grad(loss, query.stages)
    first, second = (
        [F.adaptive_avg_pool2d(stage.detach(), side) for stage, side in zip(view.stages, POOL, strict=True)]
        for view in (query, key)
    )
    return {
        "query": first,
        "second": second,
        "stranger": [stage.roll(1, dims=0) for stage in first],
        "pull": [g.square().flatten(1).sum(dim=1) for g in gradients],
        "cell": [g.shape[2] * g.shape[3] / side**2 for g, side in zip(gradients, POOL, strict=True)],
    }


def second_view(stages: dict[str, list], similarity: float, batch: int) -> list[Tensor]:
    """Stages of a synthetic second view: 1 is the same view again, 0 another image, in between a correlation.

    With strangers w and the mean c of each feature, v = c + s (u - c) + sqrt(1 - s^2) (w - c) keeps every variance.
    """
    views = []
    for u, w in zip(stages["query"], stages["stranger"], strict=True):
        u, w = u[:batch], w[:batch]
        c = u.mean(dim=0)
        views.append(c + similarity * (u - c) + (1 - similarity**2) ** 0.5 * (w - c))
    return views


@lru_cache(maxsize=8)
def _barlow(channels: tuple[int, ...], width: int, ideal: bool) -> StageBarlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = StageBarlow(channels, width, scale=SCALE).requires_grad_(False)
    if ideal:
        module.project = lambda *views: torch.stack([torch.stack(v) for v in views]).flatten(3).permute(1, 3, 0, 2)
    return module


def _independent(batch: int, width: int) -> dict[str, list]:
    """Stages whose features are independent normal numbers, as an ideal projector's would be; nothing pulls on them."""
    z, w = torch.randn(2, batch, width, 1, 1, generator=torch.Generator().manual_seed(0))
    return {"query": [z] * 4, "stranger": [w] * 4, "pull": [torch.full((batch,), torch.nan)] * 4, "cell": [1] * 4}


def compute(
    stages: dict,
    loss: str,
    weights: Sequence[float],
    similarity: float,
    batch: int,
    gain: float,
    width: int,
    off_diagonal: float,
    stage: int,
) -> dict:
    """One setting of the lab.

    Args:
        stages, similarity: see `stages_of` and `second_view`; the loss `IDEAL` takes `_independent` stages instead.
        loss, weights: one of `LOSSES`, and lambda of each stage.
        batch, gain: the first B images are used, and all features of both views are multiplied by the gain.
        width, off_diagonal: projector width D and weight w, for Barlow.
        stage: 1 to 4, whose correlation is returned.
    Returns:
        `terms`, `floor`, `unrelated` (4,): weighted loss of each stage, the same if both views were identical, and if
        the second were of other images; `correlation`: of the chosen stage's projected features (D, D) with Barlow,
        else of its channels; `agreement`: its mean diagonal; `shares` (4,): the stage term's share of the gradient on
        that stage's output, InfoNCE having the rest; `norm`: mean norm of the last stage.
    """
    if loss == IDEAL:
        stages, gain = _independent(batch, width), 1.0
    channels = tuple(s.shape[1] for s in stages["query"])
    module = StageMSE(channels, POOL, scale_free=loss != "raw MSE")
    if "Barlow" in loss:
        module = _barlow(channels, width, loss == IDEAL)
        module.off_diagonal = off_diagonal
    u = [(gain * s[:batch]).requires_grad_(True) for s in stages["query"]]
    seconds = {"terms": second_view(stages, similarity, batch), "floor": stages["query"]}
    seconds |= {"unrelated": stages["stranger"]}
    own, found, terms = _pooled(u, module.pool), {}, {}
    for name, maps in seconds.items():
        other = _pooled([gain * s[:batch] for s in maps], module.pool)
        terms[name] = [weight * term for weight, term in zip(weights, module(own, other), strict=True)]
        found[name] = np.array([term.item() for term in terms[name]])
    gradients = torch.autograd.grad(sum(terms["terms"]), u)
    # From the scaled, pooled map back to the network's own: times the gain, spread over the places of each cell.
    pulls = [gain * g.norm().item() / cell**0.5 for g, cell in zip(gradients, stages["cell"], strict=True)]
    nce = [pull[:batch].sum().item() ** 0.5 / batch for pull in stages["pull"]]
    pair = [_pooled([gain * s[:batch] for s in maps]) for maps in (stages["query"], seconds["terms"])]
    if "Barlow" in loss:
        pair = module.project(*pair).permute(2, 0, 3, 1)
    correlation = cross_correlation(*(view[stage - 1].flatten(1) for view in pair))
    found["correlation"], found["agreement"] = correlation.numpy(), correlation.diagonal().mean().item()
    found["shares"] = np.array([one / max(one + other, 1e-12) for one, other in zip(pulls, nce, strict=True)])
    found["norm"] = u[3].detach().mean(dim=(2, 3)).norm(dim=1).mean().item()
    return found


def _pooled(maps: list[Tensor], sides: Sequence[int] = (1,) * 4) -> list[Tensor]:
    """As `MoCo` pools the stages for a loss."""
    return [F.adaptive_avg_pool2d(s, side) for s, side in zip(maps, sides, strict=True)]


def rank_floor(width: int, batch: int) -> float:
    """What identical views pay at least off the diagonal, before any weight: D^2 / (B - 1) - D, or 0."""
    return max(width**2 / (batch - 1) - width, 0.0)


def draw_losses(found: dict, stage: int) -> Figure:
    """Loss per stage with its floor, the correlation matrix, and who pulls."""
    figure, axes = quick_figure(3, (9.6, 3.3))
    x = np.arange(1, 5)
    axes[0].bar(x, found["terms"], color=STAGE_COLOURS, label="loss")
    axes[0].hlines(found["floor"], x - 0.45, x + 0.45, color="black", linewidth=2, label="identical views pay")
    axes[0].set(xlabel="stage", title="loss per stage", xticks=x)
    axes[0].margins(y=0.3)
    axes[0].legend(fontsize=8)
    axes[1].imshow(found["correlation"][:SHOWN, :SHOWN], cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    axes[1].set(title=f"correlation, stage {stage}", xlabel="feature of view k", ylabel="feature of view q")
    if np.isnan(found["shares"]).all():
        axes[2].text(0.5, 2.5, "synthetic features:\nno network to pull on", ha="center", va="center")
    axes[2].barh(x, found["shares"], color=STAGE_COLOURS)
    rest = {"color": "#0072B2", "hatch": "//", "edgecolor": "white"}
    axes[2].barh(x, 1 - found["shares"], left=found["shares"], **rest)
    axes[2].set(xlim=(0, 1), ylim=(0.4, 4.6), title="who pulls?", yticks=x)
    axes[2].set(xlabel="stage term | InfoNCE (hatched)", ylabel="stage")
    axes[2].invert_yaxis()
    return figure


def loss_lab(stages: dict[str, list]) -> Lab:
    """Sliders for everything that a loss on the stages depends on; `stages` as from `stages_of`."""
    pairs = zip(stages["query"], stages["second"], strict=True)
    real = [cross_correlation(u.mean(dim=(2, 3)), v.mean(dim=(2, 3))).diagonal().mean() for u, v in pairs]

    def answer(loss, weight, similarity, batch, gain, width, off_diagonal, stage, **relative) -> Answer:
        weights = tuple(weight * part for part in relative.values())
        found = compute(stages, loss, weights, similarity, batch, gain, width, off_diagonal, stage)
        total, floor, most = (found[name].sum() for name in ("terms", "floor", "unrelated"))
        numbers = {
            "loss, all stages": f"{total:.3g}",
            "identical views would pay": f"{floor:.3g}",
            "unrelated images would pay": f"{most:.3g}",
            "agreement can save": f"{1 - floor / most:.0%} of it" if floor < most else "nothing",
            f"mean diagonal of C, stage {stage}": f"{found['agreement']:.2f}",
            "real views agree, stage by stage": ", ".join(f"{value:.2f}" for value in real),
            "norm of stage 4": f"{found['norm']:.3g}",
        }
        if "Barlow" in loss:
            least = SCALE * off_diagonal * rank_floor(width, batch) * sum(weights)
            numbers["floor by rank, four λ s w (D²/(B-1) - D), s = 1/32"] = f"{least:.3g}"
        alt = f"Bars of the loss ({loss}) per stage, {SHOWN} by {SHOWN} correlations, and gradient shares per stage."
        return draw_losses(found, stage), alt, numbers

    sizes = [n for n in (8, 16, 32, 64, MOST) if n <= len(stages["query"][0])]
    powers = {"step": 0.25, "readout_format": ".2g"}

    def idle(loss: str, **_) -> set[str]:
        projected = set() if "Barlow" in loss else {"width", "off_diagonal"}
        return projected | ({"gain"} if loss == IDEAL else set())  # `compute` replaces the stages

    controls = {
        "loss": Dropdown(options=LOSSES, description="loss"),
        "similarity": FloatSlider(0.6, min=0, max=1, step=0.05, description="views alike"),
        "weight": FloatLogSlider(10, min=-5, max=2, **powers, description="weight λ"),
        "gain": FloatLogSlider(1, min=-2, max=1, **powers, description="feature scale"),
        "batch": SelectionSlider(options=sizes, value=sizes[-1], description="batch B"),
        "width": SelectionSlider(options=(16, 32, 64, 128, 256), value=128, description="projector D"),
        "off_diagonal": FloatLogSlider(1, min=-3, max=0, **powers, description="off-diagonal w"),
        "stage": SelectionSlider(options=(1, 2, 3, 4), value=4, description="matrix of stage"),
        **{f"stage{s}": FloatSlider(1, min=0, max=1, step=0.25, description=f"stage {s} (× λ)") for s in (1, 2, 3, 4)},
    }
    wide, most = {"width": 256, "batch": sizes[1]}, sizes[-1]
    frames = [{"loss": name, "gain": 0.1} for name in LOSSES[:2]]
    alike, half = [{"similarity": 0}, {"similarity": 1}], [{"off_diagonal": 0.06}, {"width": most, "batch": most}]
    frames += [{"loss": IDEAL} | wide | changes for changes in alike + half] + [{"loss": "Barlow"} | wide]
    frames += [{"loss": LOSSES[0], "weight": weight} for weight in (0.25, 100)]
    frames += [{"loss": "Barlow", "weight": weight} for weight in (5e-5, 0.04)]
    return Lab(controls, answer, "What does this loss really reward?", idle, frames)
