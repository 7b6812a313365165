"""The training panel: start, pause, resume and stop a pretraining, and watch it, without holding the notebook up."""

import contextlib
import html
import json
import threading
import time
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from mocolayers.data.prepared import MedicalImages
from mocolayers.labs.panel import WIDGET_TYPE, as_html, error_html, someone_is_there
from mocolayers.notebook.figures import STAGE_COLOURS, new_figure, show
from mocolayers.recipe import Recipe
from mocolayers.training.pretrain import Trainer, pretrain
from mocolayers.training.runs import BUSY, Run

REDRAW_SECONDS = 2.0
PANELS = {
    "InfoNCE": ["info_nce"],
    "own key found (share)": ["contrastive_accuracy"],
    "kNN AUC, validation": ["knn_auc"],
    "loss of the stages": ["stage1", "stage2", "stage3", "stage4"],
    "effective rank of queries": ["effective_rank"],
    "scale-free distance of the stages": [f"stage{s}_scale_free" for s in (1, 2, 3, 4)],
}
OTHER_PANEL = "already training in another panel"
_at_work: dict[Path, "Work"] = {}  # by folder of the run, for all panels of this process
_lock = threading.Lock()


def compute(history: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """The curves of each panel: title to column to steps and values (2, n), without the rows that have none."""
    curves = {}
    for title, columns in PANELS.items():
        known = {c: history[["step", c]].dropna().to_numpy(float).T for c in columns if c in history}
        curves[title] = {column: curve for column, curve in known.items() if curve.size}
    return curves


def draw_training(history: pd.DataFrame, steps: int) -> Figure:
    """The curves of `PANELS` over steps; what the queue decides begins after the first row, when it was empty."""
    figure, axes = new_figure(2, 3, (11, 5), layout="tight")
    for axis, (title, curves) in zip(axes.flat, compute(history).items(), strict=True):
        for column, curve in curves.items():
            curve = curve[:, 1:] if column in ("info_nce", "contrastive_accuracy") and curve.shape[1] > 2 else curve
            colour = STAGE_COLOURS[int(column[5]) - 1] if column.startswith("stage") else "#0072B2"
            axis.plot(*curve, "o-", ms=2.5, color=colour, label=column.removesuffix("_scale_free"))
        axis.set(title=title, xlim=(0, steps), xlabel="step")
        axis.locator_params(nbins=5)
        if len(curves) > 1:
            axis.legend(fontsize=7, ncols=2)
    return figure


def discard(run: Run) -> str:
    """Remove the files that a pretraining wrote, and say which; a folder that is not this run is left as it is."""
    try:
        ours = json.loads(run.recipe_file.read_text()) == json.loads(run.recipe.to_json())
    except (OSError, ValueError):
        ours = False
    if not ours or run.folder.is_symlink():
        return f"{run.folder} is left as it is: it holds no recipe.json of this run"
    if run.busy:
        return f"{run.folder} is left as it is: {BUSY}"
    files = [run.checkpoint_file, run.history_file, run.encoder_file, run.recipe_file]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    for file in files:
        file.unlink()
    with contextlib.suppress(OSError):  # something else is in there
        run.folder.rmdir()
    return f"removed from {run.folder}: {', '.join(file.name for file in files)}"


class Work(threading.Thread):
    """One pretraining in the background, and the panel that shows it."""

    def __init__(self, panel: "TrainingPanel") -> None:
        super().__init__(daemon=True)
        self.panel, self.of, self.paused = panel, panel.run, threading.Event()

    def run(self) -> None:
        error, options = None, {"progress": False, "after_step": self._after_step, "wait": False}
        try:
            pretrain(self.of.recipe, self.panel.data, self.panel.runs_dir, self.panel.device, **options)
        except Exception as found:
            error = found
        with _lock:
            del _at_work[self.of.folder.resolve()]
        self.panel.ended(error)

    def _after_step(self, trainer: Trainer) -> bool:
        self.panel.progress(trainer)
        return self.paused.is_set()


class TrainingPanel:
    """Buttons around one pretraining at a time.

    Training runs in a thread of its own, so cells can be run meanwhile. A pause writes a checkpoint: the run can be
    resumed here, later, or by `pretrain`. Stop removes the run's files. A panel that is made while one of its runs is
    being trained, as when its cell is run again, takes that training over.

    Args:
        recipes: name and recipe to choose from.
        data: the images they were made for.
        runs_dir: where the panel keeps its runs.
        device: see `pretrain`.
    """

    def __init__(
        self, recipes: dict[str, Recipe], data: MedicalImages, runs_dir: str | Path, device: str = "auto"
    ) -> None:
        self.recipes, self.data, self.runs_dir, self.device = recipes, data, Path(runs_dir), device
        self.work: Work | None = None
        self._drawn = 0.0
        self.arm = widgets.Dropdown(options=list(recipes), description="arm")
        self.bar = widgets.IntProgress(min=0, max=1, description="step 0")
        self.state, self.view = widgets.HTML("ready"), widgets.HTML()
        hints = {
            "Start": ("play", "train, or go on from the last pause", self.start),
            "Pause": ("pause", "write a checkpoint and rest", self.pause),
            "Stop": ("stop", "end this run and remove its files", self.stop),
        }
        self.buttons = {}
        for name, (icon, tooltip, act) in hints.items():
            self.buttons[name] = widgets.Button(description=name, icon=icon, tooltip=tooltip)
            self.buttons[name].on_click(lambda _, act=act: act())
        self.arm.observe(lambda _: self._look(), names="value")
        top = widgets.HBox([self.arm, *self.buttons.values()])
        self.box = widgets.VBox([top, widgets.HBox([self.bar, self.state]), self.view])
        self.box.add_class("mocolayers-panel")
        self._look()
        self._take_over()

    @property
    def run(self) -> Run:
        """The chosen arm's run on disk."""
        return Run(self.recipes[self.arm.value], self.runs_dir)

    @property
    def elsewhere(self) -> str:
        """Where else the chosen arm is being trained; empty where it is not."""
        if self.run.folder.resolve() in _at_work:
            return OTHER_PANEL
        return BUSY if self.run.busy else ""

    def start(self) -> None:
        """Train the chosen arm from where it is."""
        with _lock:
            if elsewhere := self.elsewhere:
                self.state.value = elsewhere
                return
            self.work = _at_work[self.run.folder.resolve()] = Work(self)
        self._set("training", training=True)
        self.work.start()

    def pause(self) -> None:
        """Ask the thread to write a checkpoint after the step it is at, and to end."""
        if self.work:
            self.work.paused.set()

    def stop(self) -> None:
        """End the run and remove its files."""
        other = _at_work.get(self.run.folder.resolve())
        if other and other is not self.work:
            self.state.value = OTHER_PANEL
            return
        self.pause()
        if self.work:
            self.work.join()
        said = discard(self.run)
        self._look()
        self._set(said)

    def show(self, example: pd.DataFrame | None = None) -> None:
        """Display the panel; where no one can press a button, the history of a finished run, see `Run.history`."""
        if someone_is_there():
            display({WIDGET_TYPE: self.box._repr_mimebundle_()[WIDGET_TYPE], "text/plain": "training panel"}, raw=True)
        elif example is not None:
            show(draw_training(example, int(example["step"].max())))

    def progress(self, trainer: Trainer) -> None:
        """Show a step of the training, and now and then its curves."""
        self._step(trainer.step)
        if time.monotonic() - self._drawn > REDRAW_SECONDS and trainer.history:
            self._draw(pd.DataFrame(trainer.history))

    def ended(self, error: Exception | None) -> None:
        """Show what a training left, or the error that ended it."""
        step = self.bar.value
        self._look()
        self._step(step)
        if error:
            self._set("failed")
            self.view.value = error_html(error)

    def _take_over(self) -> None:
        for name, recipe in self.recipes.items():
            work = _at_work.get(Run(recipe, self.runs_dir).folder.resolve())
            if work and work.is_alive():
                self.arm.value = name
                before, work.panel, self.work = work.panel, self, work
                before.work = None
                self._step(before.bar.value)
                before._set("this training is shown in a newer panel")
                self._set("training, started by an earlier panel", training=True)
                return

    def _draw(self, history: pd.DataFrame) -> None:
        last, knn = history.iloc[-1], history.get("knn_auc", pd.Series(dtype=float)).dropna()
        numbers = {
            "loss": f"{last['loss']:.3f}",
            "kNN AUC on validation": f"{knn.iloc[-1]:.3f}" if len(knn) else "not yet",
        }
        figure = draw_training(history, self.run.recipe.steps)
        self.view.value = as_html(figure, f"Curves of the run up to step {last['step']:.0f}.", numbers)
        self._drawn = time.monotonic()

    def _look(self) -> None:
        """Show what is on disk of the chosen arm."""
        run, step, state = self.run, 0, "ready"
        self.view.value = ""
        if run.folder.exists():
            state = "this run was interrupted before its first checkpoint; Start begins again"
        if run.history_file.is_file():
            history = run.history()
            step = run.recipe.steps if run.finished else int(history["step"].max())
            state = "finished" if run.finished else f"paused: a checkpoint is in {run.folder}"
            self._draw(history)
        state = self.elsewhere or state
        self.bar.max = run.recipe.steps
        self._step(step)
        self._set(state)

    def _step(self, step: int) -> None:
        self.bar.value, self.bar.description = step, f"step {step}"

    def _set(self, state: str, training: bool = False) -> None:
        run, self.state.value = self.run, html.escape(state)
        paused = run.checkpoint_file.is_file() and not run.finished
        self.buttons["Start"].description = "Resume" if paused else "Start"
        self.buttons["Start"].disabled = training or run.finished
        self.buttons["Pause"].disabled = not training
        self.buttons["Stop"].disabled = not (training or run.folder.exists())
        self.arm.disabled = training
