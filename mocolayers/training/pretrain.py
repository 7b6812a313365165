"""The training loop: pretrain an encoder by a recipe, watch it, and resume it exactly after any interruption."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import Feeder, batches, random_numbers, to_float, views_of_numbers
from mocolayers.method.collectives import own_part, rank, world_size
from mocolayers.method.moco import MoCo, MoCoOutput
from mocolayers.recipe import Recipe
from mocolayers.runtime import RunError, autocast_type, resolve_device, step_generator
from mocolayers.training.distributed import average_running_statistics, averaged, from_first, parallel
from mocolayers.training.monitors import gradient_shares, knn_monitor, measurements
from mocolayers.training.runs import Run, build_encoder, save_weights, start_from, unusable, write_file
from mocolayers.training.stage_loss import stage_loss_of

CHECKPOINT_SECONDS = 30
CHECKPOINTS = 10  # at least so many in a run, however short it is
CALIBRATED = 2048  # images that batch-norm statistics are gathered from
SMALLER = "give a smaller one: --set batch=NUMBER, or prepare the images with a smaller --side"


def build_moco(recipe: Recipe) -> MoCo:
    """The model that a recipe asks for, with weights from torch's current random state."""
    names = ("stage_weights", "head", "dim", "queue", "momentum", "temperature", "bn_splits")
    settings = {name: getattr(recipe, name) for name in names}
    return MoCo(functools.partial(build_encoder, recipe), stage_loss_of(recipe), **settings)


def pretrain(
    recipe: Recipe,
    data: MedicalImages,
    runs_dir: str | Path = "runs",
    device: str = "auto",
    progress: bool = True,
    after_step: Callable[["Trainer"], bool | None] | None = None,
    init: str | Path | None = None,
    compiled: bool = False,
) -> Run:
    """Train by a recipe, or find that it has been trained already.

    Every random choice of a step follows from the seed and the step's number, so a run that was killed goes on from its
    checkpoint to bit-identical weights (on a CPU with the same number of threads), and all arms of a seed see the same
    initial weights, batches and views. What came after the last checkpoint, about half a minute, is done again.

    Started by torchrun, the processes share every batch: the recipe's is that of all together. The result is that of
    one process if bn_splits is a multiple of their number. Another number of them may resume a run. If another process
    trains this run already, it is waited for.

    Args:
        recipe: what to train; `recipe.preset` makes one.
        data: the images the recipe was made for.
        runs_dir: the run is kept in `runs_dir/KEY`.
        device: see `resolve_device`.
        progress: show a progress bar, and a note where the queue is long for the images.
        after_step: called after every step with the trainer, whose `step` and `history` may be read; True ends the
            call with a checkpoint to resume from.
        init: file of weights that the encoder starts from; the recipe's `init` is its fingerprint.
        compiled: compile the steps of a full queue with torch.compile, on a GPU with its CUDA graphs; pays there in
            long runs, and rounds a little differently. In several processes, compile the encoders alone.
    Returns:
        The run; `run.finished` is False only if `after_step` ended it.
    Raises:
        RunError: data that is not the recipe's, a damaged checkpoint or encoder, or a loss that is not finite.
    """
    if data.fingerprint != recipe.fingerprint:
        raise RunError(
            f"the recipe is for {recipe.dataset} {recipe.fingerprint}, the data is {data.fingerprint}: "
            "make the recipe again from the data set as it is now"
        )
    run, progress = Run(recipe, runs_dir), progress and rank() == 0
    if from_first(lambda: run.finished and run.load_encoder() is not None):  # a damaged encoder is no result
        return run
    with memory_errors(recipe.batch, recipe.side, SMALLER), contextlib.ExitStack() as lock:
        trainer = Trainer(recipe, data, resolve_device(device), init, compiled)
        from_first(run.open)
        if rank() == 0:
            lock.enter_context(run.alone())
        if from_first(lambda: run.finished):  # by the process that we waited for
            return run
        if state := from_first(run.checkpoint):
            trainer.restore(state, run.checkpoint_file)
        if progress and recipe.steps and recipe.queue > len(trainer.rows) / 4:
            longest = f"over a quarter of {len(trainer.rows):,} images"
            print(f"note: a queue of {recipe.queue:,} keys is {longest}: many queries meet old keys of their own image")
        if not _train(trainer, run, progress, after_step):
            return run
        trainer.calibrate()
        from_first(lambda: run.save_history(trainer.history))
        from_first(lambda: save_weights(trainer.model.encoder_q, run.encoder_file, recipe))
    return run


def _train(trainer: "Trainer", run: Run, progress: bool, after_step) -> bool:
    """Train to the last step; False if `after_step` ended it before."""
    recipe, saved, stop = run.recipe, time.monotonic(), False
    title = f"{recipe.arm} on {recipe.dataset}, seed {recipe.seed}"
    with tqdm(total=recipe.steps, initial=trainer.step, desc=title, disable=not progress, mininterval=1) as bar:
        while trainer.step < recipe.steps and not stop:
            trainer.train_step()
            bar.update()
            stop = after_step is not None and from_first(lambda: after_step(trainer))
            late = trainer.step % max(1, recipe.steps // CHECKPOINTS) == 0 or trainer.step == recipe.steps
            # Several processes agree on the time only now and then: asking costs a message.
            if world_size() == 1 or trainer.step % recipe.log_every == 0:
                late = from_first(lambda: time.monotonic() - saved > CHECKPOINT_SECONDS) or late  # noqa: B023
            if stop or late:
                trainer.check_finite()
                from_first(lambda: run.save_history(trainer.history))
                from_first(lambda: write_file(run.checkpoint_file, lambda path: torch.save(trainer.state(), path)))
                saved = time.monotonic()
    return trainer.step == recipe.steps


@contextlib.contextmanager
def memory_errors(batch: int, side: int, remedy: str = "prepare them with a smaller --side, or give --device cpu"):
    """Turn "out of memory" into one line that says what to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "DefaultCPUAllocator")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
            raise
        raise RunError(f"out of memory: a batch of {batch} images of {side} px does not fit here; {remedy}") from None


def gpu_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which frozen encoders and fine-tuning compute: bf16 on a GPU that has it, elsewhere fp32."""
    dtype = autocast_type("auto", device) if device.type == "cuda" else None
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class Trainer:
    """Model, optimiser and history of one run in memory; `train_step` does one step. For its arguments see `pretrain`.

    Only train and unlabelled rows of the data are trained on.
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
        self.rows = data.pretraining_rows()
        self.batch = _batch_size(recipe, len(self.rows))  # of all processes together
        self.part = own_part(self.batch)  # of this process
        self.steps_per_epoch = len(self.rows) // self.batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = build_moco(recipe)
        if recipe.init:
            from_first(functools.partial(print, start_from(model, init, recipe.init)))
        if device.type == "cuda":  # the convolutions that a trial finds fastest, unless they have to be the same again
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        self.model = model.to(device, memory_format=torch.channels_last).train()
        if compiled and world_size() > 1:  # what processes tell each other would break a graph of the whole step
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()
        self.in_parallel = parallel(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(
            trained, lr=recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay, fused=True
        )
        self.dtype = autocast_type(recipe.precision, device)
        # On a processor, torch leaves the gradient of a strided bf16 convolution of a single pixel unset; for a narrow
        # encoder see `StagedResNet`.
        if device.type == "cpu" and (recipe.width < 16 or recipe.side <= (16 if recipe.stem == "imagenet" else 4)):
            self.dtype = None
        self.step, self.held, self.history = 0, 0, []  # held: keys in the queue, known without asking the device
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._order = functools.lru_cache(2)(
            lambda epoch: np.random.default_rng((recipe.seed, epoch)).permutation(self.rows)
        )
        self._feed = Feeder(self._inputs, device)
        self._compiled = self._compile() if compiled and world_size() == 1 else self._forward

    def train_step(self) -> MoCoOutput:
        """One optimiser step on the next batch; between logged steps, nothing waits for the device.

        On a GPU, the output of a compiled step is overwritten by the next one.
        """
        inputs = self._feed(self.step)
        monitor = (self.step + 1) % self.recipe.monitor_every == 0 or self.step + 1 == self.recipe.steps
        logged = monitor or self.step % self.recipe.log_every == 0
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        # Only steps that are not logged, with a full queue: another kind would be compiled again.
        forward = self._compiled if not logged and self.held == self.recipe.queue else self._forward
        output = forward(*inputs, logged, self.held)
        self._finite.logical_and_(output.loss.detach().isfinite())
        row = self._observe(output, monitor) if logged else None
        self.optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimiser.step()
        self.model.enqueue(output.keys)
        self.step += 1
        self.held = min(self.held + self.batch, self.recipe.queue)
        if logged:
            if monitor:
                self.check_finite()  # neighbours cannot be found among features that are not numbers
                average_running_statistics(self.model)
                row["knn_auc"] = knn_monitor(self.model.encoder_q, self.data)
                self.model.encoder_q.train()
            self.history.append(row)
        return output

    def _forward(self, images: Tensor, numbers: Tensor, order: Tensor, stages: bool, held: int):
        x_q, x_k = views_of_numbers(to_float(images), self.recipe.views, numbers)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.in_parallel(x_q, x_k, order, stages, held)

    def _compile(self) -> Callable[..., MoCoOutput]:
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs: hundreds of launches are one
        return torch.compile(self._forward, fullgraph=True, dynamic=False, mode=mode)

    def check_finite(self) -> None:
        """Look at every loss so far and at all weights; between two looks, losses are only noted on the device."""
        state = [value.isfinite().all() for value in self.model.state_dict().values()]
        if averaged({"finite": torch.stack([self._finite, *state]).all()})["finite"] < 1:
            raise RunError(
                f"loss or weights of {self.recipe.arm} are not finite after {self.step} steps: training diverged; "
                "lower lr or stage_weights in the recipe. The last good checkpoint is kept"
            )

    def calibrate(self) -> None:
        """Gather the query encoder's batch-norm statistics from images as they are; the same images for every arm."""
        count = max(self.batch, min(CALIBRATED, len(self.rows)) // self.batch * self.batch)
        rows = np.random.default_rng(0).permutation(self.rows)[:count]
        update_bn(batches(self.data, rows, self.device, self.batch), self.model.encoder_q)

    def state(self) -> dict:
        """All that a resumed run needs."""
        return {
            "recipe": self.recipe.key,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
        }

    def restore(self, state: dict, source: Path) -> None:
        """Go on from a checkpoint's state."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.history = int(state["step"]), list(state["history"])
            self.held = int(self.model.filled)
        except Exception as error:
            raise unusable(source, f"does not fit the recipe ({type(error).__name__})") from None

    def batch_rows(self, step: int) -> np.ndarray:
        """The rows of a step that this process holds."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self.batch : (place + 1) * self.batch][self.part]

    def _inputs(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The images of a step, and all its randomness: the numbers of both views, and the order of the keys."""
        generator = step_generator(self.recipe.seed, step)
        numbers = random_numbers(generator, 2, self.batch)[:, self.part]
        order = torch.randperm(self.batch, generator=generator)
        return torch.from_numpy(self.data.images[self.batch_rows(step)]), numbers, order

    def _observe(self, output: MoCoOutput, monitor: bool) -> dict[str, float]:
        self.check_finite()
        seen = measurements(output)
        if monitor and len(output.terms) > 1:
            seen |= gradient_shares(output, list(self.model.encoder_q.parameters()))
        place = {"step": self.step + 1, "epoch": self.step / self.steps_per_epoch}
        return place | {"lr": learning_rate(self.recipe, self.step)} | averaged(seen)


def _batch_size(recipe: Recipe, images: int) -> int:
    """The recipe's batch, or, where there are fewer images, as many as make equal groups of batch-norm."""
    groups = math.lcm(recipe.bn_splits, world_size())
    batch = min(recipe.batch, images // groups * groups)
    if batch < 2 * groups:
        raise RunError(
            f"{recipe.dataset} has {images} images to train on, batches of {recipe.batch} are asked for: batch-norm in "
            f"{groups} group(s) needs at least {2 * groups}; add images, or give --set bn_splits=1"
        )
    return batch


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate for a step, counted from 0: constant, or half a cosine from `lr` to 0."""
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
