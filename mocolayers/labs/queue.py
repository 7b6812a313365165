"""The queue and temperature lab: one query against its own key and a belt of older keys."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.labs.panel import Answer, Lab, power_slider, quick_figure, steps_slider, tick, whole_slider
from mocolayers.method.moco import follow
from mocolayers.recipe import Recipe
from mocolayers.runtime import resolve_device, step_generator
from mocolayers.training.pretrain import Trainer

MOMENTA = (0.0, 0.5, 0.9, 0.99, 0.999)
KEYS_PER_STEP = 16
BARS = 25


class KeyHistory(NamedTuple):
    """Keys of the same images as every momentum would have made them, at moments of one training.

    Attributes:
        q: (N, D) queries at the end, of unit length.
        keys: for each momentum (T, N, D); the last axis but one is images, the first is time, the last entry is now.
        age: (T,) how many steps ago each of the T moments was, 0 for now.
        classes: (N, L) booleans, see `class_matrix`.
    """

    q: np.ndarray
    keys: dict[float, np.ndarray]
    age: np.ndarray
    classes: np.ndarray


def key_history(recipe: Recipe, data: MedicalImages, device: str = "auto", steps=48, every=4, images=256) -> KeyHistory:
    """Train MoCo for some steps, and follow its query encoder with one key encoder per momentum.

    Args:
        recipe: an arm of which the first `steps` steps are trained, in memory only.
        data: its images; `images` random training rows are encoded.
        device: see `pretrain`.
        steps, every: how long to train, and how often to encode.
        images: how many images have keys.
    """
    trainer = Trainer(recipe, data, resolve_device(device))
    followers = {m: (copy.deepcopy(trainer.model.encoder_q), copy.deepcopy(trainer.model.head_q)) for m in MOMENTA}
    rows = np.sort(np.random.default_rng(recipe.seed).permutation(data.rows("train"))[:images])
    x_q, x_k = trainer.views(torch.from_numpy(data.images[rows]).to(trainer.device), step_generator(recipe.seed, 10**6))
    moments = {m: [] for m in MOMENTA}
    for step in tqdm(range(1, steps + 1), desc="following the query encoder"):
        trainer.train_step()
        for momentum, pair in followers.items():
            _follow(pair, (trainer.model.encoder_q, trainer.model.head_q), momentum)
            if step % every == 0:
                moments[momentum].append(_embed(pair, x_k))
    q = _embed((trainer.model.encoder_q, trainer.model.head_q), x_q)
    age = np.arange(steps - every, -1, -every)
    return KeyHistory(q, {m: np.stack(z) for m, z in moments.items()}, age, class_matrix(data, rows))


@torch.no_grad()
def _follow(pair, query, momentum: float) -> None:
    for follower, leader in zip(pair, query, strict=True):
        follow(list(follower.parameters()), list(leader.parameters()), momentum)


@torch.no_grad()
def _embed(pair, x: Tensor) -> np.ndarray:
    """(N, D) unit vectors, with batch statistics of their own as in training; no buffer is moved."""
    encoder, head = copy.deepcopy(pair[0]).train(), pair[1]
    return F.normalize(head(encoder(x).embedding).float(), dim=1).cpu().numpy()


class Game(NamedTuple):
    """The matching game for every query.

    Attributes:
        logits: (N, 1 + K) similarities over the temperature, own key first.
        same: (N, K) True where a key of the queue shows the query's class: a false negative.
        loss: mean InfoNCE.
        found: share of queries whose own key beats the queue.
        strangers: mean InfoNCE with a fresh key of *another* image in the own key's place. It shows nothing of the
            image, so it should grow as guessing does, log(1 + K); where it stops, added keys are told apart by age.
        false_mass: share of the negatives' probability that lies on keys of the query's own class.
    """

    logits: np.ndarray
    same: np.ndarray
    loss: float
    found: float
    strangers: float
    false_mass: float


def compute(history: KeyHistory, momentum: float, length: int, temperature: float, drop_same: bool) -> Game:
    """Play the game against a queue of `length` keys, `KEYS_PER_STEP` of which were made at each step.

    Args:
        drop_same: leave keys of the query's class out of its negatives, which needs the labels.
    """
    n = len(history.q)
    place = np.arange(length)
    moment = np.argmin(np.abs(history.age[:, None] - place // KEYS_PER_STEP), axis=0)  # K
    # Of a query's own image no older key is in the queue: the images of the queue are the n - 1 that follow it.
    image = (np.arange(n)[:, None] + 1 + place % (n - 1)) % n  # N x K
    keys = history.keys[momentum]
    every = np.einsum("nd,tmd->ntm", history.q, keys, optimize=True)  # N x T x N
    negative = every[np.arange(n)[:, None], moment, image] / temperature
    same = (history.classes[image] & history.classes[:, None]).any(axis=2)
    if drop_same:
        negative = np.where(same, -np.inf, negative)
    now = every[:, -1] / temperature
    own, stranger = np.diagonal(now), np.diagonal(np.roll(now, n // 2, axis=1))
    logits, blind = (np.concatenate([z[:, None], negative], axis=1) for z in (own, stranger))
    mass = softmax(negative, axis=1)
    loss, strangers = (float((logsumexp(z, axis=1) - z[:, 0]).mean()) for z in (logits, blind))
    found = float((own > negative.max(axis=1)).mean())
    return Game(logits, same, loss, found, strangers, float((mass * same).sum(axis=1).mean()))


def draw_game(game: Game, query: int, temperature: float):
    """Similarities of one query, and what the softmax makes of them."""
    figure, axes = quick_figure(2, (9, 3.6))
    own, negative, same = game.logits[query, 0], game.logits[query, 1:], game.same[query]
    bins = np.linspace(-1, 1, 41)
    kinds = {"other classes": (~same, "#0072B2"), "same class: false negatives": (same, "#CC79A7")}
    values = [temperature * negative[kind & np.isfinite(negative)] for kind, _ in kinds.values()]
    axes[0].hist(
        values, bins, histtype="stepfilled", stacked=True, color=[c for _, c in kinds.values()], label=list(kinds)
    )
    axes[0].axvline(temperature * own, color="#D55E00", linewidth=2, label="own key")
    axes[0].set(xlabel="cosine to the query", ylabel="keys in the queue", title="What the query sees")
    axes[0].legend(fontsize=8)
    order = np.argsort(-negative)[: BARS - 1]
    shown = np.concatenate([[0], order + 1])
    colours = ["#D55E00", *("#CC79A7" if same[j] else "#0072B2" for j in order)]
    probability = softmax(game.logits[query])[shown]
    axes[1].bar(range(len(shown)), probability, color=colours)
    axes[1].set(
        ylim=(0, max(0.2, 1.1 * probability.max())),
        xlabel="own key, then the hardest others",
        ylabel="probability",
        title="What the loss sees",
    )
    return figure


def queue_lab(history: KeyHistory) -> Lab:
    """Sliders for temperature, queue length and momentum, and a box that removes false negatives."""
    longest = (int(history.age[0]) + 1) * KEYS_PER_STEP

    def answer(temperature: float, length: int, momentum: float, drop_same: bool, query: int) -> Answer:
        game = compute(history, momentum, length, temperature, drop_same)
        share = softmax(game.logits[query])[0]
        numbers = {
            "loss, mean over queries": f"{game.loss:.3f}   (guessing costs {np.log(1 + length):.3f})",
            "loss with a stranger's fresh key in its place": f"{game.strangers:.3f}",
            "own key found": f"{game.found:.0%}",
            "probability on false negatives, of all negatives": f"{game.false_mass:.0%}",
            "this query: probability of its own key": f"{share:.3f}",
        }
        alt = f"Cosines of one query to {length} keys, and softmax bars at temperature {temperature:.2g}."
        return Answer(draw_game(game, query, temperature), alt, numbers)

    controls = {
        "temperature": power_slider("temperature", 0.1, -2, 0.5),
        "length": whole_slider("queue length", min(256, longest), KEYS_PER_STEP, longest, KEYS_PER_STEP),
        "momentum": steps_slider("momentum", 0.99, list(MOMENTA)),
        "drop_same": tick("leave out keys of the query's class"),
        "query": whole_slider("query", 0, 0, len(history.q) - 1),
    }
    return Lab(controls, answer, "Does it know the image, or only the age of the key?")
