"""Fine-tuning: encoder and classifier together, on some labels; from an untrained encoder this is "supervised"."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import Feeder, batches, random_numbers, to_float, views_of_numbers
from mocolayers.evaluation.scores import validation_score
from mocolayers.method.collectives import own_part
from mocolayers.method.encoder import StagedResNet
from mocolayers.recipe import Evaluation, Views
from mocolayers.runtime import RunError, resolve_device, step_generator
from mocolayers.training.distributed import average_running_statistics, parallel, share_rows
from mocolayers.training.pretrain import gpu_precision, memory_errors

# Mild on purpose, and the same at every label fraction.
FINETUNE_VIEWS = {
    "chest": Views(crop=0.8, rotation=10, jitter=0, gray=0, blur=0),
    "histology": Views(crop=0.8, hflip=0.5, vflip=0.5, jitter=0, gray=0, blur=0),
    "retina": Views(crop=0.8, rotation=30, hflip=0.5, jitter=0, gray=0, blur=0),
}


class Classifier(nn.Module):
    """An encoder (copied) with one linear layer on its embedding.

    Attributes:
        labels_read: how many different labelled images `fine_tune` showed it.
    """

    labels_read = 0

    def __init__(self, encoder: StagedResNet, task: str, labels: int) -> None:
        super().__init__()
        self.encoder, self.task = copy.deepcopy(encoder), task
        self.head = nn.Linear(encoder.dim, labels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) logits of images (B, C, H, W); a binary task has two like any other exclusive classes."""
        return self.head(self.encoder(x).embedding)

    @torch.no_grad()
    def predict(self, data: MedicalImages, rows: np.ndarray) -> np.ndarray:
        """(n, L) probabilities of the given rows; batch-norm in evaluation mode."""
        self.eval()
        device = self.head.weight.device

        def predicted(own: np.ndarray) -> np.ndarray:
            with gpu_precision(device):
                logits = torch.cat([self(x).float() for x in batches(data, own, device)])
            return (logits.sigmoid() if self.task == "multilabel" else logits.softmax(dim=1)).cpu().numpy()

        return share_rows(rows, predicted)


def fine_tune(
    encoder: StagedResNet,
    data: MedicalImages,
    rows: np.ndarray,
    plan: Evaluation,
    seed: int,
    device: str = "auto",
) -> Classifier:
    """Train on some labels and return the classifier as it was when it did best on validation.

    Started by torchrun, the processes share every batch, and each image's view is what it is in one process; batch-norm
    sees each process's part.

    Args:
        rows: training rows whose labels may be used; every one of them is read.
        seed: of the new layer, the order of the rows and the augmentation.
    Raises:
        RunError: the training diverged, or out of memory.
    """
    device = resolve_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(encoder, data.task, len(data.classes))
    model.to(device, memory_format=torch.channels_last)
    # On a processor, the fused optimiser rounds differently.
    optimiser = torch.optim.Adam(model.parameters(), lr=plan.lr, fused=device.type == "cuda")
    in_parallel, views = parallel(model), FINETUNE_VIEWS.get(data.modality, FINETUNE_VIEWS["chest"])
    held_out = np.sort(np.random.default_rng(0).permutation(data.rows("val"))[: plan.most_validation_rows])
    truth, order, best = class_matrix(data, held_out), row_order(rows, plan, seed), -np.inf
    looks = set(np.linspace(0, len(order), plan.checks + 1).round()[1:])
    feed = Feeder(lambda step: _inputs(data, order[step], step_generator(seed, step)), device, len(order))
    for step in range(len(order)):
        with memory_errors(plan.batch, data.side):
            _step(in_parallel.train(), optimiser, data.task, views, *feed(step))
        if step + 1 not in looks:
            continue
        average_running_statistics(model)
        probabilities = model.predict(data, held_out)
        if not np.isfinite(probabilities).all():
            raise RunError(f"fine-tuning diverged by step {step + 1}; lower its learning rate, which is {plan.lr:g}")
        reached = validation_score(truth, probabilities)
        if reached > best:
            best, kept = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    model.labels_read = len(np.unique(order))
    return model.eval()


def row_order(rows: np.ndarray, plan: Evaluation, seed: int) -> np.ndarray:
    """(steps, batch) training rows: one shuffled epoch after another, cut into batches.

    The steps are those of `plan.epochs`, rounded up, but at least `plan.least_steps`.
    """
    steps = max(plan.least_steps, -(-plan.epochs * len(rows) // plan.batch))
    epochs = range(-(-steps * plan.batch // len(rows)))
    shuffled = np.concatenate([np.random.default_rng((seed, epoch)).permutation(rows) for epoch in epochs])
    return shuffled[: steps * plan.batch].reshape(steps, plan.batch)


def _inputs(data: MedicalImages, drawn: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What this process holds of a step: images, the numbers that decide their views, and classes (B, L)."""
    part = own_part(len(drawn))
    own, numbers = np.sort(drawn)[part], random_numbers(generator, len(drawn))[part]
    return torch.from_numpy(data.images[own]), numbers, torch.from_numpy(class_matrix(data, own))


def _step(model, optimiser, task: str, views: Views, images: Tensor, numbers: Tensor, classes: Tensor) -> None:
    x = views_of_numbers(to_float(images), views, numbers[None])[0]
    with gpu_precision(x.device):
        logits = model(x).float()
    if task == "multilabel":
        loss = F.binary_cross_entropy_with_logits(logits, classes.float())
    else:
        loss = F.cross_entropy(logits, classes.int().argmax(dim=1))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
