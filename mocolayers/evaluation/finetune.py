"""Judge an encoder with few labels: linear evaluation, fine-tuning, and training from scratch."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.data.labels import class_matrix
from mocolayers.data.prepared import MedicalImages
from mocolayers.data.views import batches, random_view, to_float
from mocolayers.evaluation.scores import macro_auc
from mocolayers.method.collectives import own_part
from mocolayers.method.encoder import StagedResNet
from mocolayers.recipe import Evaluation, Views
from mocolayers.runtime import resolve_device, step_generator
from mocolayers.training.distributed import average_running_statistics, parallel, share_rows

# Mild on purpose, and the same at every label fraction.
FINETUNE_VIEWS = {
    "chest": Views(crop=0.8, rotation=10, jitter=0, gray=0, blur=0),
    "histology": Views(crop=0.8, hflip=0.5, vflip=0.5, jitter=0, gray=0, blur=0),
    "retina": Views(crop=0.8, rotation=30, hflip=0.5, jitter=0, gray=0, blur=0),
}


class Classifier(nn.Module):
    """An encoder with one linear layer on its embedding.

    Args:
        encoder: copied, so that the caller's weights stay as they are.
        task, labels: what to predict; binary tasks get two outputs like any other exclusive classes.
    """

    def __init__(self, encoder: StagedResNet, task: str, labels: int) -> None:
        super().__init__()
        self.encoder, self.task = copy.deepcopy(encoder), task
        self.head = nn.Linear(encoder.dim, labels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) logits of images (B, C, H, W)."""
        return self.head(self.encoder(x).embedding)

    @torch.no_grad()
    def predict(self, data: MedicalImages, rows: np.ndarray, batch: int = 250) -> np.ndarray:
        """(n, L) probabilities of the given rows; batch-norm in evaluation mode."""
        self.eval()
        device = self.head.weight.device

        def predicted(own: np.ndarray) -> np.ndarray:
            logits = torch.cat([self(x).float() for x in batches(data, own, device, batch)])
            return (logits.sigmoid() if self.task == "multilabel" else logits.softmax(dim=1)).cpu().numpy()

        return share_rows(rows, predicted)


def task_loss(task: str, logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy, or its mean over labels for a multilabel task; logits and boolean classes (B, L)."""
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, classes.float())
    return F.cross_entropy(logits, classes.int().argmax(dim=1))


def fine_tune(
    encoder: StagedResNet,
    data: MedicalImages,
    rows: np.ndarray,
    plan: Evaluation,
    seed: int,
    device: str = "auto",
    views: Views | None = None,
) -> Classifier:
    """Train encoder and a new linear layer together on some labels; from an untrained encoder this is "supervised".

    Started by torchrun, the processes share every batch, and each image's view is what it is in one process; batch-norm
    sees each process's part.

    Args:
        encoder: the start; it is copied.
        data: images and labels.
        rows: training rows whose labels may be used.
        plan: steps, batch, learning rate of Adam.
        seed: of the new layer, the order of the rows and the augmentation.
        device: see `pretrain`.
        views: the augmentation; None means that of the modality in `FINETUNE_VIEWS`.
    Returns:
        The classifier as it was when it did best on validation; the test split is never read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(encoder, data.task, len(data.classes))
    model.to(resolve_device(device), memory_format=torch.channels_last)
    in_parallel = parallel(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=plan.lr)
    views = views or FINETUNE_VIEWS.get(data.modality, FINETUNE_VIEWS["chest"])
    held_out = np.sort(np.random.default_rng(0).permutation(data.rows("val"))[: plan.most_validation_rows])
    truth, best, kept = class_matrix(data, held_out), -np.inf, None
    for step in range(plan.steps):
        _fine_tune_step(in_parallel.train(), optimiser, data, rows, plan, seed, step, views)
        if (step + 1) % plan.check_every == 0 or step + 1 == plan.steps:
            average_running_statistics(model)
            reached = np.nan_to_num(macro_auc(truth, model.predict(data, held_out))[0])
            if reached > best:
                best, kept = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.eval()


def _fine_tune_step(model, optimiser, data, rows, plan: Evaluation, seed: int, step: int, views: Views) -> None:
    drawn = np.sort(np.random.default_rng((seed, step)).choice(rows, plan.batch, replace=len(rows) < plan.batch))
    drawn, device = drawn[own_part(plan.batch)], next(model.parameters()).device
    x = to_float(torch.from_numpy(data.images[drawn]).to(device))
    x = random_view(x, views, step_generator(seed, step))
    optimiser.zero_grad(set_to_none=True)
    task_loss(data.task, model(x), torch.from_numpy(class_matrix(data, drawn)).to(device)).backward()
    optimiser.step()
