"""Judge an encoder with few labels: linear evaluation, fine-tuning, and training from scratch."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from mocolayers.datasets import MedicalImages, class_matrix, label_subset
from mocolayers.distributed import average_running_statistics, from_first, own_part, parallel, share_rows
from mocolayers.encoder import StagedResNet, encode
from mocolayers.files import atomic_write
from mocolayers.metrics import macro_auc, patient_bootstrap, scores
from mocolayers.moco import build_encoder
from mocolayers.pretrain import resolve_device, step_generator
from mocolayers.recipe import Evaluation, Views
from mocolayers.runs import Run, load_weights, save_weights, unfilled
from mocolayers.views import batches, random_view, to_float

MOST_NEWTON_WEIGHTS = 1024  # its matrix has as many rows and columns
MODES = ("linear", "finetune")
# Mild on purpose, and the same at every label fraction.
FINETUNE_VIEWS = {
    "chest": Views(crop=0.8, rotation=10, jitter=0, gray=0, blur=0),
    "histology": Views(crop=0.8, hflip=0.5, vflip=0.5, jitter=0, gray=0, blur=0),
    "retina": Views(crop=0.8, rotation=30, hflip=0.5, jitter=0, gray=0, blur=0),
}


def encode_splits(encoder: StagedResNet, data: MedicalImages) -> dict[str, np.ndarray]:
    """Embeddings of "train", "val" and "test", rows as in `data.rows(split)`."""
    return {split: encode(encoder, data, data.rows(split)) for split in ("train", "val", "test")}


def linear_evaluation(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple[np.ndarray, float]:
    """Logistic regression on frozen features.

    Args:
        features: see `encode_splits`; (n, D) per split.
        data: whose labels are used.
        rows: training rows whose labels may be used, see `label_subset`.
        plan: candidates for C; the best on validation is taken.
    Returns:
        (n_test, L) probabilities for the test rows, and the chosen C.
    """
    probe, _ = best_probe(features, data, rows, plan)
    return probe.predict(features["test"]), probe.penalty


def best_probe(
    features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation
) -> tuple["LinearProbe", float]:
    """The probe of `linear_evaluation` and its validation AUC; neither features nor labels of the test are needed."""
    inside = np.searchsorted(data.rows("train"), rows)
    x, classes = features["train"][inside], class_matrix(data, rows)
    truth = class_matrix(data, data.rows("val"))
    best, chosen = -np.inf, None
    for penalty in plan.penalties:
        model = LinearProbe(data.task, penalty).fit(x, classes)
        reached = float(np.nan_to_num(macro_auc(truth, model.predict(features["val"]))[0]))
        if reached > best:
            best, chosen = reached, model
    return chosen, best


class LinearProbe:
    """Standardised features and logistic regression: one model for exclusive classes, one per label for multilabel.

    Args:
        task: see `MedicalImages`.
        penalty: scikit-learn's C.
    """

    def __init__(self, task: str, penalty: float) -> None:
        self.task, self.penalty = task, penalty

    def fit(self, x: np.ndarray, classes: np.ndarray) -> "LinearProbe":
        """Fit on features (n, D) and classes (n, L)."""
        targets = classes.T if self.task == "multilabel" else [classes.argmax(axis=1)]
        self.models = [self._fit_one(x, target) for target in targets]
        self.labels = classes.shape[1]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n, L) probabilities."""
        if self.task == "multilabel":
            return np.stack([self._positive(model, x) for model in self.models], axis=1)
        model = self.models[0]
        full = np.zeros((len(x), self.labels))
        full[:, model.classes_.astype(int)] = model.predict_proba(x)
        return full

    def _fit_one(self, x: np.ndarray, target: np.ndarray):
        # A label that the subset never (or always) shows cannot be fitted; it is predicted at its rate.
        if (kinds := len(np.unique(target))) < 2:
            return float(target.mean())
        chosen = solver(len(x), x.shape[1], kinds)
        if chosen == "newton-cholesky":
            x = x.astype(float)  # in single precision its matrix can look singular
        model = LogisticRegression(C=self.penalty, max_iter=2000, solver=chosen)
        return make_pipeline(StandardScaler(), model).fit(x, target)

    @staticmethod
    def _positive(model, x: np.ndarray) -> np.ndarray:
        return np.full(len(x), model) if isinstance(model, float) else model.predict_proba(x)[:, 1]


def solver(rows: int, features: int, kinds: int) -> str:
    """Newton's method where rows outnumber a few weights: up to ten times as fast as L-BFGS, and exact."""
    weights = features * (kinds if kinds > 2 else 1)
    return "newton-cholesky" if weights < min(rows, MOST_NEWTON_WEIGHTS) else "lbfgs"


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


def evaluate(
    run: Run,
    data: MedicalImages,
    mode: str,
    fraction: float,
    subset: int,
    plan: Evaluation,
    device: str = "auto",
    features: Callable[[], dict[str, np.ndarray]] | None = None,
) -> dict:
    """Judge a finished run once, or read the result if that has been done already.

    Args:
        run: a finished pretraining.
        data: the data set to judge on.
        mode: "linear", "finetune", or with `features` any name that tells which features these are.
        fraction: label fraction.
        subset: number of the draw within the run's seed: of the label subset, and in fine-tuning also of the new layer,
            the order of the rows and the augmentation. So with all labels another subset is the same labels again.
        plan: see `Evaluation`.
        features: returns what `encode_splits` does; lets many linear evaluations share one encoding, or judges other
            frozen features than the embedding.
    Returns:
        One row: arm, dataset, fraction, seed, subset, mode, labels, auc, low, high, other metrics, seconds, recipe key.
        Test probabilities are kept beside it as `.npz`.
    """
    if mode not in MODES and features is None:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}, or give the features to judge")
    place = evaluation_file(run, data, mode, fraction, subset, plan)
    beside = (".json", ".npz", ".safetensors") if mode == "finetune" else (".json", ".npz")
    if from_first(lambda: all(place.with_suffix(ending).is_file() for ending in beside)):
        return json.loads(place.read_text())
    started = time.perf_counter()
    seed = run.recipe.seed
    rows = label_subset(data, fraction, subset_seed(seed, subset))
    place.parent.mkdir(parents=True, exist_ok=True)
    if mode != "finetune":
        encoded = features() if features else encode_splits(run.load_encoder().to(resolve_device(device)), data)
        probabilities, _ = from_first(lambda: linear_evaluation(encoded, data, rows, plan))
    else:
        model = fine_tune(run.load_encoder(), data, rows, plan, fine_tuning_seed(seed, subset), device)
        probabilities = model.predict(data, data.rows("test"))
        from_first(lambda: save_weights(model, place.with_suffix(".safetensors")))
    row = describe(run, data, probabilities, plan) | {
        "mode": mode,
        "fraction": fraction,
        "subset": subset,
        "labels": len(rows),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return from_first(lambda: _kept(place, probabilities, row))


def _kept(place: Path, probabilities: np.ndarray, row: dict) -> dict:
    atomic_write(place.with_suffix(".npz"), lambda path: _save_compressed(path, probabilities))
    atomic_write(place, lambda path: path.write_text(json.dumps(row, indent=1)))
    return row


def _save_compressed(path: Path, probabilities: np.ndarray) -> None:
    with path.open("wb") as file:  # numpy would add its own ending to a name
        np.savez_compressed(file, test=probabilities)


def fine_tuned(
    run: Run, data: MedicalImages, fraction: float, subset: int, plan: Evaluation, device: str = "auto"
) -> tuple[Classifier, np.ndarray]:
    """The classifier that `evaluate` fine-tunes and keeps, in evaluation mode, with its (n_test, L) probabilities."""
    evaluate(run, data, "finetune", fraction, subset, plan, device)
    place = evaluation_file(run, data, "finetune", fraction, subset, plan)
    model = unfilled(lambda: Classifier(build_encoder(run.recipe), data.task, len(data.classes)))
    load_weights(model, place.with_suffix(".safetensors"))
    with np.load(place.with_suffix(".npz")) as kept:
        return model.eval(), kept["test"]


def describe(run: Run, data: MedicalImages, probabilities: np.ndarray, plan: Evaluation) -> dict:
    """Scores and interval of test probabilities, with what they belong to."""
    test = data.rows("test")
    classes = class_matrix(data, test)
    low, high = patient_bootstrap(classes, probabilities, data.patients[test], plan.resamples)
    recipe = run.recipe
    about = {"arm": recipe.arm, "dataset": recipe.dataset, "seed": recipe.seed, "recipe": recipe.key}
    return about | scores(data.task, classes, probabilities) | {"low": low, "high": high}


def subset_seed(seed: int, subset: int) -> int:
    """The seed of `label_subset` for the n-th subset of a pretraining seed; no two pairs share one."""
    return seed * 1000 + subset


def fine_tuning_seed(seed: int, subset: int) -> int:
    """The seed of `fine_tune` for the n-th subset of a pretraining seed; that of the first is the pretraining's own."""
    return seed + 1000 * subset


def evaluation_file(run: Run, data: MedicalImages, mode: str, fraction: float, subset: int, plan: Evaluation) -> Path:
    """Where the result of `evaluate` is kept; another plan, or other images than the run's, is another file."""
    tag = hashlib.sha256(repr(plan).encode()).hexdigest()[:6]
    if data.fingerprint != run.recipe.fingerprint:
        tag += f"-{data.fingerprint}"
    return run.folder / "evaluations" / f"{mode}-{fraction:g}-{subset}-{tag}.json"
