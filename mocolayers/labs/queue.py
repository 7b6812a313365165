"""The queue and temperature lab: one query against its own key and a belt of older keys."""

import copy
from dataclasses import replace

import numpy as np
import torch
from ipywidgets import Checkbox, FloatLogSlider, IntSlider, SelectionSlider
from matplotlib.figure import Figure
from scipy.special import logsumexp, softmax
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import two_views
from mocolayers.labs.panel import Answer, Lab, quick_figure
from mocolayers.recipe import Recipe
from mocolayers.runtime import resolve_device, step_generator
from mocolayers.training.pretrain import Trainer

MOMENTA = (0.0, 0.5, 0.9, 0.99, 0.999)
KEYS_PER_STEP = 16
BARS = 25


def key_history(recipe: Recipe, data: MedicalImages, device: str = "auto", steps=48, every=4, images=256) -> dict:
    """Train MoCo for some steps, and follow its query encoder with one key encoder per momentum.

    Args:
        recipe: an arm of which the first `steps` steps are trained, in memory only.
        data: its images; `images` random training rows are encoded.
        device: see `pretrain`.
        steps, every: how long to train, and how often to encode.
        images: how many images have keys.
    Returns:
        `q` (N, D): unit-length queries at the end; `keys`: by momentum (T, N, D), the last of T moments is now; `age`
        (T,): how many steps ago each moment was; `classes` (N, L): booleans, see `class_matrix`.
    """
    trainer = Trainer(replace(recipe, steps=max(recipe.steps, steps)), data, resolve_device(device))
    leader = nn.ModuleList([trainer.model.encoder_q, trainer.model.head_q])
    followers = {momentum: copy.deepcopy(leader) for momentum in MOMENTA}
    rows = np.sort(np.random.default_rng(recipe.seed).permutation(data.rows("train"))[:images])
    images, generator = torch.from_numpy(data.images[rows]).to(trainer.device), step_generator(recipe.seed, 10**6)
    x_q, x_k = two_views(images, recipe.views, generator)
    moments = {momentum: [] for momentum in MOMENTA}
    for step in tqdm(range(1, steps + 1), desc="following the query encoder"):
        trainer.train_step()
        for momentum, follower in followers.items():
            with torch.no_grad():
                torch._foreach_lerp_([*follower.parameters()], [*leader.parameters()], 1 - momentum)
            if step % every == 0:
                moments[momentum].append(_embed(follower, x_k))
    keys = {momentum: np.stack(moment) for momentum, moment in moments.items()}
    age = np.arange(steps - every, -1, -every)
    return {"q": _embed(leader, x_q), "keys": keys, "age": age, "classes": class_matrix(data, rows)}


@torch.no_grad()
def _embed(pair: nn.ModuleList, x: Tensor) -> np.ndarray:
    """(N, D) unit vectors, with batch statistics of their own as in training; no buffer is moved."""
    encoder, head = copy.deepcopy(pair[0]).train(), pair[1]
    return F.normalize(head(encoder(x).embedding).float(), dim=1).cpu().numpy()


def compute(history: dict, momentum: float, length: int, temperature: float, drop_same: bool) -> dict:
    """Match every query with its key against a queue of `length` keys, `KEYS_PER_STEP` of them made at each step.

    Args:
        history: see `key_history`.
        momentum, length, temperature: MoCo's three.
        drop_same: leave keys of the query's class out of its negatives, which needs the labels.
    Returns:
        `logits` (N, 1 + K): own key first; `same` (N, K): the key shows the query's class, a false negative; `loss`:
        mean InfoNCE; `guess`: what guessing costs among the same keys; `found`: share of queries whose own key beats
        the queue; `false_mass`: the false negatives' share of the negatives' probability.
    """
    n = len(history["q"])
    place = np.arange(length)
    moment = np.argmin(np.abs(history["age"][:, None] - place // KEYS_PER_STEP), axis=0)  # K
    # Of a query's own image no older key is in the queue: the images of the queue are the n - 1 that follow it.
    image = (np.arange(n)[:, None] + 1 + place % (n - 1)) % n  # N x K
    every = np.einsum("nd,tmd->ntm", history["q"], history["keys"][momentum], optimize=True)  # N x T x N
    negative = every[np.arange(n)[:, None], moment, image] / temperature
    same = (history["classes"][image] & history["classes"][:, None]).any(axis=2)
    if drop_same:
        negative = np.where(same, -np.inf, negative)
    own = np.diagonal(every[:, -1]) / temperature
    logits = np.concatenate([own[:, None], negative], axis=1)
    return {
        "logits": logits,
        "same": same,
        "loss": float((logsumexp(logits, axis=1) - own).mean()),
        "guess": float(np.log1p(np.isfinite(negative).sum(axis=1)).mean()),
        "found": float((own > negative.max(axis=1)).mean()),
        "false_mass": float((softmax(negative, axis=1) * same).sum(axis=1).mean()),
    }


def draw_game(game: dict, query: int, temperature: float) -> Figure:
    """Similarities of one query, and what the softmax makes of them."""
    figure, axes = quick_figure(2, (9, 3.6))
    own, negative, same = game["logits"][query, 0], game["logits"][query, 1:], game["same"][query]
    colours = np.where(same, "#CC79A7", "#0072B2")
    values = [temperature * negative[kind & np.isfinite(negative)] for kind in (~same, same)]
    look = {"color": ["#0072B2", "#CC79A7"], "label": ["other classes", "same class: false negatives"]}
    axes[0].hist(values, np.linspace(-1, 1, 41), histtype="stepfilled", stacked=True, **look)
    axes[0].axvline(temperature * own, color="#D55E00", linewidth=2, label="own key")
    axes[0].set(xlabel="cosine to the query", ylabel="keys in the queue", title="What the query sees")
    axes[0].margins(y=0.35)
    axes[0].legend(fontsize=8)
    order = np.argsort(-negative)[: BARS - 1]
    probability = softmax(game["logits"][query])[np.append(0, order + 1)]
    axes[1].bar(range(len(probability)), probability, color=["#D55E00", *colours[order]])
    axes[1].set(ylim=(0, max(0.04, 1.1 * probability.max())), title="What the loss sees")
    axes[1].set(xlabel="own key, then the hardest others", ylabel="probability")
    return figure


def queue_lab(history: dict) -> Lab:
    """Sliders for temperature, queue length and momentum, and a box that removes false negatives."""
    longest = (int(history["age"][0]) + 1) * KEYS_PER_STEP

    def answer(temperature: float, length: int, momentum: float, drop_same: bool, query: int) -> Answer:
        game = compute(history, momentum, length, temperature, drop_same)
        numbers = {
            "loss, mean over queries": f"{game['loss']:.3f}   (guessing costs {game['guess']:.3f})",
            "own key found": f"{game['found']:.0%}",
            "false negatives, mean over queries": f"{game['same'].mean():.0%} of the keys, "
            + ("left out" if drop_same else f"with {game['false_mass']:.0%} of the probability of all negatives"),
            "this query: probability of its own key": f"{softmax(game['logits'][query])[0]:.3f}",
        }
        alt = f"Cosines of one query to {length} keys, and softmax bars at temperature {temperature:.2g}."
        return draw_game(game, query, temperature), alt, numbers

    controls = {
        "temperature": FloatLogSlider(0.1, min=-2, max=0.5, step=0.25, readout_format=".2g", description="temperature"),
        "length": IntSlider(min(256, longest), KEYS_PER_STEP, longest, KEYS_PER_STEP, description="queue length"),
        "momentum": SelectionSlider(options=MOMENTA, value=0.99, description="momentum"),
        "drop_same": Checkbox(False, indent=False, description="leave out keys of the query's class"),
        "query": IntSlider(0, min=0, max=len(history["q"]) - 1, description="query"),
    }
    frames = [{"temperature": temperature} for temperature in (0.01, 0.03, 0.3, 1)]
    lengths, momenta = (KEYS_PER_STEP, longest), (MOMENTA[0], 0.99, MOMENTA[-1])
    frames += [{"length": n, "momentum": m} for n in lengths for m in momenta] + [{"drop_same": True}]
    return Lab(controls, answer, "Does the query know its image, or only the age of the key?", frames=frames)
