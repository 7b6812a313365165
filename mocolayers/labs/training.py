"""The training panel: start, pause, resume and stop a pretraining, and watch it, without holding the notebook up."""

import shutil
import threading
import time
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from mocolayers.data.prepared import MedicalImages
from mocolayers.labs.panel import WIDGET_TYPE, Answer, as_html, error_html, someone_is_there
from mocolayers.notebook.figures import STAGE_COLOURS, new_figure, show
from mocolayers.recipe import Recipe
from mocolayers.training.pretrain import Trainer, pretrain
from mocolayers.training.runs import Run

REDRAW_SECONDS = 2.0
PANELS = {
    "loss terms": ["info_nce", "stage1", "stage2", "stage3", "stage4"],
    "kNN AUC, validation": ["knn_auc"],
    "effective rank of queries": ["effective_rank"],
    "scale-free distance of the stages": [f"stage{s}_scale_free" for s in (1, 2, 3, 4)],
}


def compute(history: pd.DataFrame) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The curves of each panel: title to column to steps and values, without the rows that have none."""
    curves = {}
    for title, columns in PANELS.items():
        known = {c: history[["step", c]].dropna().to_numpy(float).T for c in columns if c in history}
        curves[title] = {column: (steps, values) for column, (steps, values) in known.items() if len(steps)}
    return curves


def draw_training(history: pd.DataFrame, steps: int) -> Figure:
    """Loss terms, kNN AUC, effective rank and stage distances over steps."""
    figure, axes = new_figure(2, 2, (9, 5), layout="tight")
    for axis, (title, curves) in zip(axes.flat, compute(history).items(), strict=True):
        for column, (at, values) in curves.items():
            stage = [s for s in (1, 2, 3, 4) if column.startswith(f"stage{s}")]
            colour = STAGE_COLOURS[stage[0] - 1] if stage else "#0072B2"
            axis.plot(at, values, "o-", ms=2.5, color=colour, label=column.removesuffix("_scale_free"))
        axis.set(title=title, xlim=(0, steps), xlabel="step")
        if len(curves) > 1:
            axis.legend(fontsize=7, ncols=2)
    return figure


class TrainingPanel:
    """Buttons around one pretraining at a time.

    Training runs in a thread of its own, so cells can be run meanwhile. A pause writes a checkpoint: the run can be
    resumed here, later, or by `pretrain`. Stopping throws the run's folder away.

    Args:
        recipes: name and recipe to choose from.
        data: the images they were made for.
        runs_dir: where the panel keeps its runs; give it a folder of its own, so that stopping deletes nothing else.
        device: see `pretrain`.
    """

    def __init__(
        self, recipes: dict[str, Recipe], data: MedicalImages, runs_dir: str | Path, device: str = "auto"
    ) -> None:
        self.recipes, self.data, self.runs_dir, self.device = recipes, data, Path(runs_dir), device
        self.thread: threading.Thread | None = None
        self._pause, self._drawn = threading.Event(), 0.0
        self.arm = widgets.Dropdown(options=list(recipes), description="arm")
        self.bar = widgets.IntProgress(min=0, max=1, description="step 0")
        self.state = widgets.HTML("ready")
        self.view = widgets.HTML()
        self.start_button = widgets.Button(
            description="Start", icon="play", tooltip="train, or go on from the last pause"
        )
        self.pause_button = widgets.Button(description="Pause", icon="pause", tooltip="write a checkpoint and rest")
        self.stop_button = widgets.Button(description="Stop", icon="stop", tooltip="end this run and throw it away")
        self.start_button.on_click(lambda _: self.start())
        self.pause_button.on_click(lambda _: self.pause())
        self.stop_button.on_click(lambda _: self.stop())
        self.arm.observe(lambda _: self._look(), names="value")
        buttons = widgets.HBox([self.arm, self.start_button, self.pause_button, self.stop_button])
        self.box = widgets.VBox([buttons, widgets.HBox([self.bar, self.state]), self.view])
        self.box.add_class("mocolayers-panel")
        self._look()

    @property
    def run(self) -> Run:
        """The chosen arm's run on disk."""
        return Run(self.recipes[self.arm.value], self.runs_dir)

    @property
    def training(self) -> bool:
        """Whether a thread is at work."""
        return self.thread is not None and self.thread.is_alive()

    def start(self) -> None:
        """Train the chosen arm from where it stands."""
        if self.training:
            return
        self._pause.clear()
        self.thread = threading.Thread(target=self._train, args=(self.run.recipe,), daemon=True)
        self._buttons(True)
        self.state.value = "training"
        self.thread.start()

    def pause(self) -> None:
        """Ask the thread to write a checkpoint after the step it is at, and to end."""
        self._pause.set()

    def stop(self) -> None:
        """End the run and delete its folder."""
        self._pause.set()
        if self.training:
            self.thread.join()
        shutil.rmtree(self.run.folder, ignore_errors=True)
        self._look()

    def show(self, example: pd.DataFrame | None = None) -> None:
        """Display the panel; where no one can press a button, a finished run's history stands there.

        Args:
            example: history to draw then, see `Run.history`.
        """
        if someone_is_there():
            display({WIDGET_TYPE: self.box._repr_mimebundle_()[WIDGET_TYPE], "text/plain": "training panel"}, raw=True)
        elif example is not None:
            alt = "Loss terms, kNN AUC, effective rank and stage distances over the steps of a finished run."
            show(draw_training(example, int(example["step"].max())), alt)

    def _train(self, recipe: Recipe) -> None:
        try:
            done = pretrain(recipe, self.data, self.runs_dir, self.device, progress=False, after_step=self._after_step)
            self._draw(done.history(), recipe.steps)
            self.state.value = _standing(done)
        except Exception as error:
            self.state.value, self.view.value = "failed", error_html(error)
        self._buttons(False)

    def _after_step(self, trainer: Trainer) -> bool:
        self.bar.value, self.bar.description = trainer.step, f"step {trainer.step}"
        if time.monotonic() - self._drawn > REDRAW_SECONDS and trainer.history:
            self._draw(pd.DataFrame(trainer.history), trainer.recipe.steps)
        return self._pause.is_set()

    def _draw(self, history: pd.DataFrame, steps: int) -> None:
        last = history.iloc[-1]
        knn = history["knn_auc"].dropna() if "knn_auc" in history else []
        numbers = {
            "loss": f"{last['loss']:.3f}",
            "kNN AUC on validation": f"{knn.iloc[-1]:.3f}" if len(knn) else "not yet",
        }
        figure = draw_training(history, steps)
        self.view.value = as_html(Answer(figure, f"Curves of the run up to step {last['step']:.0f}.", numbers))
        self._drawn = time.monotonic()

    def _look(self) -> None:
        """Show what stands on disk of the chosen arm."""
        run, steps = self.run, self.recipes[self.arm.value].steps
        self.bar.max, self.bar.value, self.bar.description = steps, 0, "step 0"
        self.state.value, self.view.value = "ready", ""
        if run.history_file.is_file():
            history = run.history()
            self.bar.value = steps if run.finished else int(history["step"].max())
            self.bar.description = f"step {self.bar.value}"
            self._draw(history, steps)
            self.state.value = _standing(run)
        self._buttons(False)

    def _buttons(self, training: bool) -> None:
        paused = self.run.checkpoint_file.is_file() and not self.run.finished
        self.start_button.description = "Resume" if paused else "Start"
        self.start_button.disabled = training or self.run.finished
        self.pause_button.disabled = not training
        self.stop_button.disabled = not (training or self.run.folder.exists())
        self.arm.disabled = training


def _standing(run: Run) -> str:
    return "finished" if run.finished else "paused: a checkpoint stands in the run's folder"
