"""`watch`: a pretraining and its curves, which are drawn again while it trains."""

import time
from pathlib import Path

import pandas as pd
from IPython.display import DisplayHandle

from mocolayers.data.prepared import MedicalImages
from mocolayers.notebook.figures import histories, picture
from mocolayers.recipe import Recipe
from mocolayers.training.pretrain import Trainer, pretrain
from mocolayers.training.runs import Run

REDRAW_SECONDS = 4.0
CURVES = {
    "info_nce": "InfoNCE",
    "contrastive_accuracy": "own key found (share)",
    "knn_auc": "kNN AUC, validation",
    "effective_rank": "effective rank of queries",
    "stage1_scale_free": "scale-free distance, stage 1",
    "stage4_scale_free": "scale-free distance, stage 4",
}


def watch(
    recipe: Recipe, data: MedicalImages, runs_dir: str | Path, device: str = "auto", beside: dict | None = None
) -> Run:
    """`pretrain` under a picture of its curves, and of those of finished runs beside it.

    After the stop button, the cell, run again, goes on from the last checkpoint to the same bits. What the queue
    decides begins after the first row, when the queue was empty.

    Args:
        recipe, data, runs_dir, device: see `pretrain`.
        beside: name and history of other runs.
    """
    shown, drawn = DisplayHandle(), 0.0
    shown.display({"text/plain": "the curves come with the first steps; an untrained arm has none"}, raw=True)

    def draw(history: pd.DataFrame) -> None:
        title = f"{recipe.arm}: step {history['step'].max():.0f} of {recipe.steps}"
        shown.update(picture(histories((beside or {}) | {recipe.arm: history}, CURVES, title, after=1)))

    def after_step(trainer: Trainer) -> None:
        nonlocal drawn
        if len(trainer.history) > 1 and time.monotonic() - drawn > REDRAW_SECONDS:
            draw(pd.DataFrame(trainer.history))
            drawn = time.monotonic()

    run = pretrain(recipe, data, runs_dir, device, after_step=after_step)
    if len(history := run.history()) > 1:
        draw(history)
    return run
