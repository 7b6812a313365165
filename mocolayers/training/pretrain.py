"""The training loop: pretrain an encoder by a recipe, watch it, and resume it exactly after any interruption."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import TwoViews, to_float
from mocolayers.evaluation.features import encode
from mocolayers.method.collectives import own_part, rank, world_size
from mocolayers.method.moco import MoCo, MoCoOutput
from mocolayers.recipe import Recipe
from mocolayers.runtime import RunError, atomic_write, autocast_type, resolve_device, step_generator
from mocolayers.training.distributed import average_running_statistics, averaged, from_first, parallel
from mocolayers.training.monitors import (
    contrastive_accuracy,
    effective_rank,
    gradient_shares,
    knn_monitor,
    stage_statistics,
)
from mocolayers.training.runs import Run, load_checkpoint, save_weights, start_from


@torch.no_grad()
def gather_batch_norm_statistics(encoder: nn.Module, batches) -> None:
    """Set the running means and variances of an encoder to those of the given batches of images.

    Without this a randomly initialised encoder is judged with means of 0 and variances of 1 that fit no layer of it.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    encoder.train()
    for batch in batches:
        encoder(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()


CHECKPOINT_SECONDS = 30


def pretrain(
    recipe: Recipe,
    data: MedicalImages,
    runs_dir: str | Path = "runs",
    device: str = "auto",
    progress: bool = True,
    after_step: Callable[["Trainer"], bool] | None = None,
    init: str | Path | None = None,
    compiled: bool = False,
) -> Run:
    """Train by a recipe, or find that it has been trained already.

    Every random choice of a step follows from the seed and the step's number, so a run that was killed goes on from its
    checkpoint to bit-identical weights (on a CPU with the same number of threads), and all arms of a seed see the same
    initial weights, the same batches and the same views.

    Started by torchrun, the processes share every batch: the recipe's is that of all together. They give the queue, the
    loss and the gradients of one process with that batch, if bn_splits is a multiple of their number (each process has
    its own groups of batch-norm); a run may be resumed by another number of them. The folder of runs must be one that
    all processes see.

    Args:
        recipe: what to train; `recipe.preset` makes one.
        data: the images the recipe was made for.
        runs_dir: the run is kept in `runs_dir/KEY`.
        device: "auto", "cpu" or "cuda".
        progress: show a progress bar.
        after_step: called after every step with the trainer, whose `step` and `history` may be read; True ends the
            call with a checkpoint to resume from.
        init: file of weights that the encoder starts from; the recipe's `init` is its fingerprint.
        compiled: compile the encoders with torch.compile; pays on GPUs in long runs, and rounds a little differently.
    Returns:
        The run; `run.finished` is False only if `after_step` ended it.
    Raises:
        RunError: data that is not the recipe's, a damaged checkpoint, or a loss that is not finite.
    """
    if data.fingerprint != recipe.fingerprint:
        raise RunError(
            f"the recipe is for {recipe.dataset} {recipe.fingerprint}, the data is {data.fingerprint}: "
            "make the recipe again from the data set as it is now"
        )
    run = Run(recipe, runs_dir)
    if from_first(lambda: run.finished):
        return run
    trainer = Trainer(recipe, data, resolve_device(device), init, compiled)
    if state := from_first(lambda: _opened(run)):
        trainer.restore(state, run.checkpoint_file)
    if recipe.steps == 0:
        trainer.calibrate()
    elif not _train(trainer, run, progress and rank() == 0, after_step):
        return run
    from_first(lambda: _write_history(trainer, run))
    average_running_statistics(trainer.model)
    from_first(lambda: save_weights(trainer.model.encoder_q, run.encoder_file))
    return run


def _opened(run: Run) -> dict | None:
    """Make the run's folder; the state of its checkpoint, if there is one."""
    run.open()
    return load_checkpoint(run.checkpoint_file) if run.checkpoint_file.is_file() else None


def _train(trainer: "Trainer", run: Run, progress: bool, after_step) -> bool:
    recipe, saved = run.recipe, time.monotonic()
    title = f"{recipe.arm} on {recipe.dataset}, seed {recipe.seed}"
    with tqdm(total=recipe.steps, initial=trainer.step, desc=title, disable=not progress, mininterval=1) as bar:
        while trainer.step < recipe.steps:
            trainer.train_step()
            bar.update()
            stop = after_step is not None and from_first(lambda: after_step(trainer))
            # Processes agree on the time only now and then: asking costs a message.
            asked = world_size() == 1 or trainer.step % recipe.log_every == 0
            late = asked and from_first(lambda: time.monotonic() - saved > CHECKPOINT_SECONDS)  # noqa: B023
            if stop or late or trainer.step == recipe.steps:
                _save(trainer, run)
                saved = time.monotonic()
            if stop and trainer.step < recipe.steps:
                return False
    return True


def _save(trainer: "Trainer", run: Run) -> None:
    average_running_statistics(trainer.model)
    from_first(lambda: _write_history(trainer, run))
    from_first(lambda: atomic_write(run.checkpoint_file, lambda path: torch.save(trainer.state(), path)))


def _write_history(trainer: "Trainer", run: Run) -> None:
    atomic_write(run.history_file, lambda path: pd.DataFrame(trainer.history).to_csv(path, index=False))


class Trainer:
    """Model, optimiser and history of one run in memory; `train_step` does one step.

    Args:
        recipe: what to train.
        data: its images; only train and unlabelled rows are trained on.
        device: where to compute.
        init, compiled: see `pretrain`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: MedicalImages,
        device: torch.device,
        init: str | Path | None = None,
        compiled: bool = False,
    ) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = MoCo(recipe)
        if recipe.init:
            start_from(model, init, recipe.init)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        if compiled:
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()
        self.in_parallel = parallel(self.model)
        self.views = TwoViews(recipe.views)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(
            trained, lr=recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay, fused=True
        )
        self.rows = data.pretraining_rows()
        self.batch = min(recipe.batch, len(self.rows))  # of all processes together
        self.steps_per_epoch = len(self.rows) // self.batch
        self.dtype = autocast_type(recipe.precision, device)
        # fp16 has so few small numbers that gradients are scaled up, or they become zero.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.step, self.history, self._order = 0, [], (-1, None)
        self._feed = Feeder(lambda step: torch.from_numpy(data.images[self.batch_rows(step)]), device)

    def train_step(self) -> MoCoOutput:
        """One optimiser step on the next batch."""
        generator = step_generator(self.recipe.seed, self.step)
        x_q, x_k = self.views(self._feed(self.step), generator)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        monitor = (self.step + 1) % self.recipe.monitor_every == 0 or self.step + 1 == self.recipe.steps
        watched = monitor or self.step % self.recipe.log_every == 0
        with self.autocast():
            output = self.in_parallel(x_q, x_k, generator, stage_share(self.recipe, self.step), watched)
        row = self._observe(output, monitor) if watched else None
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        if row is not None:
            if monitor:
                average_running_statistics(self.model)
                row["knn_auc"] = knn_monitor(lambda rows: encode(self.model.encoder_q, self.data, rows), self.data)
                self.model.encoder_q.train()
            self.history.append(row)
        return output

    def calibrate(self) -> None:
        """Fit the batch-norm statistics of an untrained encoder to at most 2,048 training images."""
        groups = np.array_split(self.rows[:2048], max(1, len(self.rows[:2048]) // 128))
        gather_batch_norm_statistics(self.model.encoder_q, (to_float(self._images(rows)) for rows in groups))

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 or fp16 where it is used, else nothing."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def state(self) -> dict:
        """All that a resumed run needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }

    def restore(self, state: dict, source: Path) -> None:
        """Go on from a checkpoint's state."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            if state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise RunError(
                f"{source} does not fit this recipe ({first}). To start this run again: rm {source}"
            ) from None
        self.step, self.history = state["step"], state["history"]

    def batch_rows(self, step: int) -> np.ndarray:
        """The rows of a step that this process holds."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.recipe.seed, epoch)).permutation(self.rows))
        return self._order[1][place * self.batch : (place + 1) * self.batch][own_part(self.batch)]

    def _images(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.data.images[rows]).to(self.device)

    def _observe(self, output: MoCoOutput, monitor: bool) -> dict[str, float]:
        if not torch.isfinite(output.loss):
            raise RunError(
                f"the loss of {self.recipe.arm} is {output.loss.item()} at step {self.step + 1}: training diverged; "
                "lower lr or stage_weights in the recipe"
            )
        row = {
            "step": self.step + 1,
            "epoch": self.step / self.steps_per_epoch,
            "lr": learning_rate(self.recipe, self.step),
            "loss": output.loss.item(),
            **{name: term.item() for name, term in output.terms.items()},
            "contrastive_accuracy": contrastive_accuracy(output.logits),
            "embedding_std": output.q.std(dim=0).mean().item(),
            "effective_rank": effective_rank(output.q),
            **stage_statistics(output),
        }
        if monitor and len(output.terms) > 1:
            row |= gradient_shares(output, list(self.model.encoder_q.parameters()))
        return averaged(row)


class Feeder:
    """The images of a step, on the device; for a GPU those of the next step are read while this one is computed.

    Args:
        read: from the number of a step to its images (B, H, W, C).
        device: where they are wanted.
        ahead: read ahead in a thread; by default only for a GPU, since it would take time from a processor that trains.
    """

    def __init__(self, read: Callable[[int], Tensor], device: torch.device, ahead: bool | None = None) -> None:
        self.read, self.device = read, device
        self.pool = ThreadPoolExecutor(1) if (device.type == "cuda" if ahead is None else ahead) else None
        self._next = (-1, None)

    def __call__(self, step: int) -> Tensor:
        if self.pool is None:
            return self.read(step)
        number, waiting = self._next
        images = waiting.result() if number == step else self.pool.submit(self._fetch, step).result()
        self._next = (step + 1, self.pool.submit(self._fetch, step + 1))
        return images.to(self.device, non_blocking=True)

    def _fetch(self, step: int) -> Tensor:
        images = self.read(step)
        # Only from pinned memory can a GPU copy while it computes.
        return images.pin_memory() if self.device.type == "cuda" else images


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate for a step, counted from 0: constant, or half a cosine from `lr` to 0."""
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * 0.5 * (1 + float(np.cos(np.pi * step / recipe.steps)))


def stage_share(recipe: Recipe, step: int) -> float:
    """What part of their weights the stage losses have at a step, counted from 0."""
    warm = recipe.stage_warmup * recipe.steps
    return 1.0 if step >= warm else step / warm
