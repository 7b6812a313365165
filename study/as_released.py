"""What six properties of the released code do to a conclusion: the same thing as released and soundly, side by side.

E1, E2 and E4 are about the evaluation, O3 and O6 about the training, A1 about the analysis. Each control changes one
property and nothing else: encoders, seeds, label subsets and test images are those of the sound way. What is said here
is about the released code's properties on these data, never about the paper's numbers.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

from mocolayers.data.labels import class_matrix, label_subset, subset_seed
from mocolayers.data.prepared import MedicalImages, load
from mocolayers.data.views import batches
from mocolayers.evaluation.features import STAGES, kept_stage_features, stage_features
from mocolayers.evaluation.finetune import fine_tune
from mocolayers.evaluation.judge import evaluate, evaluation_file, fine_tuned, fine_tuning_seed
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc, patient_weights
from mocolayers.evaluation.similarity import cka, released_cka
from mocolayers.notebook.figures import panels
from mocolayers.recipe import EVALUATIONS, Evaluation, Recipe, Views, preset
from mocolayers.runtime import atomic_write, resolve_device, step_generator
from mocolayers.training.pretrain import Trainer, pretrain
from mocolayers.training.runs import Run, save_weights
from study.report import interval
from study.run import FINE_TUNED_SUBSETS

BASE, FEW = "moco", 0.01


MINUS = ", minus MoCo's"


LINEAR = f"linear AUC at {FEW:.0%}"


STARTS = {z: f"{LINEAR}, all {word} zero_init_residual" for z, word in ((False, "without"), (True, "with"))}


UNTOUCHED = Views(ratio=1, jitter=0, gray=0, blur=0)


UNEQUAL = STARTS[False] + MINUS


EARLY = "first losses, share of guessing"


COLUMNS = ("code", "dataset", "seed", "arm", "quantity", "as_released", "sound")


@dataclass(frozen=True)
class Setting:
    """One data set and seed, and the encoders that its controls share.

    Attributes:
        data: the images.
        seed: of pretrainings, label subsets and fine-tunings.
        arms: the stage arms to compare with MoCo.
        preset_name: size of the runs.
        runs_dir: where runs are kept.
    """

    data: MedicalImages
    seed: int
    arms: tuple[str, ...] = ("mse",)
    preset_name: str = "lesson"
    runs_dir: str | Path = "runs"

    @property
    def plan(self) -> Evaluation:
        return EVALUATIONS[self.preset_name]

    @property
    def all_arms(self) -> tuple[str, ...]:
        return (BASE, *self.arms)

    def recipe(self, arm: str, **changes) -> Recipe:
        """In fp32, so that the table does not depend on what the processor is fast at."""
        return preset(self.preset_name, arm, self.data, self.seed, precision="fp32", **changes)

    def run(self, arm: str, **changes) -> Run:
        """The finished pretraining of an arm; trained on first use."""
        return pretrain(self.recipe(arm, **changes), self.data, self.runs_dir, progress=False)

    def sound_subsets(self, fraction: float) -> list[np.ndarray]:
        """The label subsets of the seed, as `evaluate` draws them."""
        return [label_subset(self.data, fraction, subset_seed(self.seed, n)) for n in range(self.plan.subsets)]

    def linear_auc(self, run: Run, subsets: list[np.ndarray]) -> float:
        """Test AUC of linear evaluation, the mean over label subsets."""
        features = kept_stage_features(run, self.data)[-1]
        return float(np.mean([probe_auc(features, self.data, rows, self.plan) for rows in subsets]))


def probe_auc(features: dict[str, np.ndarray], data: MedicalImages, rows: np.ndarray, plan: Evaluation) -> float:
    """Test AUC of linear evaluation with the labels of some rows; one half if they all show the same class."""
    if not np.ptp(data.labels[rows], axis=0).any():
        return 0.5  # such a model says the same of every image, which ranks none above another
    probabilities, _ = linear_evaluation(features, data, rows, plan)
    return float(macro_auc(class_matrix(data, data.rows("test")), probabilities)[0])


def control(setting: Setting, codes: tuple[str, ...] | None = None) -> pd.DataFrame:
    """The rows of some controls (all of them by default) for one data set and seed, see `COLUMNS`."""
    rows = [row | {"code": code} for code in codes or CONTROLS for row in CONTROLS[code](setting)]
    about = {"dataset": setting.data.name, "seed": setting.seed}
    return pd.DataFrame([row | about for row in rows], columns=COLUMNS)


def controls(
    datasets: list[str],
    seeds: list[int],
    arms: tuple[str, ...] = ("mse",),
    preset_name: str = "lesson",
    runs_dir: str | Path = "runs",
) -> pd.DataFrame:
    """All controls on data sets and seeds, with a progress bar; pretrained encoders are found again."""
    cells = [(name, seed, code) for name in datasets for seed in seeds for code in CONTROLS]
    found = []
    with tqdm(cells, desc="as released and soundly", unit="control") as bar:
        for name, seed, code in bar:
            bar.set_postfix_str(f"{code} {name} {seed}")
            found.append(control(Setting(load(name), seed, arms, preset_name, runs_dir), (code,)))
    order = pd.concat(found).assign(place=lambda t: t["code"].map(list(CONTROLS).index))
    return order.sort_values(["place", "dataset", "seed"], kind="stable", ignore_index=True).drop(columns="place")


def write_table(table: pd.DataFrame, csv: Path) -> None:
    """Write the table atomically; five digits, because an interval as released is that narrow."""
    csv.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(csv, functools.partial(table.to_csv, index=False, float_format="%.5f"))


def _row(quantity: str, released: float, sound: float, arm: str = "") -> dict:
    return {"arm": arm, "quantity": quantity, "as_released": float(released), "sound": float(sound)}


def _by_arm(quantity: str, values: dict[str, tuple[float, float]]) -> Iterator[dict]:
    """A row per arm, and for each stage arm its difference to MoCo, which is the conclusion that may move."""
    for arm, (released, sound) in values.items():
        yield _row(quantity, released, sound, arm)
        if arm != BASE:
            yield _row(quantity + MINUS, released - values[BASE][0], sound - values[BASE][1], arm)


def released_order(data: MedicalImages, seed: int) -> np.ndarray:
    """Training rows in the publisher's order: histology by patient and then class, retina by class.

    Histology patients stand there in an order that nothing explains, so the seed draws one; it decides who comes first.
    """
    rows = data.rows("train")
    names, patient = np.unique(data.patients[rows], return_inverse=True)
    patient = np.random.default_rng(seed).permutation(len(names))[patient]
    labels = data.labels[rows]
    return rows[np.lexsort((labels, patient) if data.modality == "histology" else (patient, labels))]


def aliased_shuffle(count: int, seed: int) -> np.ndarray:
    """(count,) what numpy's shuffle leaves of 0, 1, 2 ... in a torch tensor.

    numpy swaps two places by reading both and then writing both. Of a tensor it reads views, so the second write copies
    what the first has just put there: one value is lost, the other stands there twice. As it goes from the last place
    to the first and swaps with a place before, the first k places end up with values below k only.
    """
    places = torch.arange(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy says that this may duplicate; that is the point
        np.random.RandomState(seed).shuffle(places)
    return places.numpy()


def released_subset(data: MedicalImages, fraction: float, seed: int, draw: int = 0) -> np.ndarray:
    """Training rows as the released code draws a label fraction; neither sorted nor all different."""
    rows = released_order(data, seed)
    return rows[aliased_shuffle(len(rows), subset_seed(seed, draw))[: int(len(rows) * fraction)]]


def label_draw(setting: Setting) -> Iterator[dict]:
    """E1: the smallest label subset, drawn through a shuffle that aliases, against whole patients, stratified."""
    data = setting.data
    if data.modality not in ("histology", "retina"):
        return
    released = [released_subset(data, FEW, setting.seed, n) for n in range(setting.plan.subsets)]
    both = released, setting.sound_subsets(FEW)
    counts = {
        "images drawn": len,
        "different images": lambda rows: len(np.unique(rows)),
        "patients": lambda rows: len(np.unique(data.patients[rows])),
        "classes": lambda rows: len(np.unique(data.labels[rows])),
    }
    for name, count in counts.items():
        yield _row(name, *(np.mean([count(rows) for rows in subsets]) for subsets in both))
    runs = {arm: setting.run(arm) for arm in setting.all_arms}
    yield from _by_arm(LINEAR, {arm: tuple(setting.linear_auc(run, s) for s in both) for arm, run in runs.items()})


def lost_augmentation(setting: Setting) -> Iterator[dict]:
    """E2: what more labels gain in fine-tuning if fewer of them also means no augmentation, against always with it."""
    if setting.data.modality != "histology":
        return
    fractions = setting.plan.fractions
    aucs = {arm: {f: _tuned_aucs(setting, setting.run(arm), f) for f in fractions} for arm in setting.all_arms}
    every = fractions[-1]
    for few in fractions[:-1]:
        yield from _by_arm(f"fine-tuning AUC at {few:.0%}", {arm: tuned[few] for arm, tuned in aucs.items()})
        gains = {arm: tuple(tuned[every][1] - auc for auc in tuned[few]) for arm, tuned in aucs.items()}
        yield from _by_arm(f"gain from {few:.0%} to {every:.0%} of the labels", gains)


def _tuned_aucs(setting: Setting, run: Run, fraction: float) -> tuple[float, float]:
    """Mean test AUC of fine-tunings without augmentation, and with; with all labels both have it."""
    data, plan = setting.data, setting.plan
    draws = range(min(FINE_TUNED_SUBSETS, plan.subsets))
    augmented = float(np.mean([evaluate(run, data, "finetune", fraction, n, plan)["auc"] for n in draws]))
    if fraction == 1:
        return augmented, augmented
    bare = [_bare_auc(setting, run, fraction, n) for n in draws]
    return float(np.mean(bare)), augmented


def _bare_auc(setting: Setting, run: Run, fraction: float, draw: int) -> float:
    data = setting.data
    rows = label_subset(data, fraction, subset_seed(setting.seed, draw))
    seed = fine_tuning_seed(setting.seed, draw)
    model = fine_tune(run.load_encoder(), data, rows, setting.plan, seed, views=UNTOUCHED)
    test = data.rows("test")
    return float(macro_auc(class_matrix(data, test), model.predict(data, test))[0])


def released_interval(draws: np.ndarray) -> tuple[float, float]:
    """Mean -+ 1.96 std / sqrt(R) of R resampled statistics: how well their mean is known, not the statistic."""
    half = 1.96 * draws.std() / np.sqrt(len(draws))
    return float(draws.mean() - half), float(draws.mean() + half)


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of R resampled statistics."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def interval_width(setting: Setting) -> Iterator[dict]:
    """E4: both intervals of the same resampled differences to MoCo, on every label subset of linear evaluation."""
    base = _resampled(setting, BASE)
    for arm in setting.arms:
        differences = [other - own for other, own in zip(_resampled(setting, arm), base, strict=True)]
        differences = [d[np.isfinite(d)] for d in differences]
        ends = np.array([(released_interval(d), percentile_interval(d)) for d in differences])  # (comparisons, 2, 2)
        widths, clear = ends[..., 1] - ends[..., 0], (ends[..., 0] > 0) | (ends[..., 1] < 0)
        yield _row("comparisons with MoCo", len(ends), len(ends), arm)
        released, sound = widths.mean(axis=0)
        yield _row("interval width", released, sound, arm)
        yield _row("interval width, in released ones", 1, sound / released, arm)
        yield _row("share of comparisons clear of zero", *clear.mean(axis=0), arm)


def _resampled(setting: Setting, arm: str) -> list[np.ndarray]:
    """(R,) resampled test AUCs per label fraction and subset; the same patients for every arm."""
    data, plan, run = setting.data, setting.plan, setting.run(arm)
    test = data.rows("test")
    classes, weights = class_matrix(data, test), patient_weights(data.patients[test], plan.resamples)
    found = []
    for fraction in plan.fractions:
        for subset in range(plan.subsets if fraction < 1 else 1):
            evaluate(run, data, "linear", fraction, subset, plan, features=lambda: kept_stage_features(run, data)[-1])
            with np.load(evaluation_file(run, data, "linear", fraction, subset, plan).with_suffix(".npz")) as kept:
                found.append(macro_auc(classes, kept["test"], weights))
    return found


def unequal_starts(setting: Setting) -> Iterator[dict]:
    """O3: MoCo starts without zero_init_residual and its variants with it, against all without, and all with it."""
    subsets = setting.sound_subsets(FEW)
    starts = itertools.product(setting.all_arms, (False, True))
    aucs = {(arm, z): setting.linear_auc(setting.run(arm, zero_init_residual=z), subsets) for arm, z in starts}
    for zero, name in STARTS.items():
        values = {arm: (aucs[arm, arm != BASE], aucs[arm, zero]) for arm in setting.all_arms}
        yield from _by_arm(name, values)


class ReleasedTrainer(Trainer):
    """A `Trainer` whose queue starts with random keys, and whose validation is the training's forward pass.

    Args:
        recipe, data, device: see `Trainer`.
    """

    def __init__(self, recipe: Recipe, data: MedicalImages, device: torch.device) -> None:
        super().__init__(recipe, data, device)
        self._generator = step_generator(recipe.seed, recipe.steps)  # of a step that training does not reach
        keys = torch.randn(self.model.queue.shape, generator=self._generator)
        self.model.queue.copy_(F.normalize(keys, dim=1))
        self.model.filled.fill_(recipe.queue)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of validation images against themselves; moves the key encoder and fills the queue with them."""
        self.model.eval()
        images = batches(self.data, self.data.rows("val"), self.device, self.batch)
        losses = [self.model(x, x, self._generator).loss.item() for x in images]
        self.model.train()
        return float(np.mean(losses))


def pretrain_as_released(recipe: Recipe, data: MedicalImages, runs_dir: str | Path) -> tuple[Run, Run]:
    """Train with validation after every epoch and at the end; trained once, then found again.

    Returns:
        The run at the epoch with the lowest validation loss, and at the last step. The history of either is one row per
        step: step, info_nce, guessing (the loss of who cannot tell keys apart), and validation, NaN between epochs.
    """
    chosen, last = (Run(recipe, Path(runs_dir) / "as-released" / name) for name in ("lowest-loss", "last-step"))
    if chosen.finished and last.finished:
        return chosen, last
    trainer = ReleasedTrainer(recipe, data, resolve_device("auto"))
    chosen.open(), last.open()
    rows, lowest = [], np.inf
    while trainer.step < recipe.steps:
        row = _observed(trainer) | {"validation": np.nan}
        if trainer.step % trainer.steps_per_epoch == 0 or trainer.step == recipe.steps:
            row["validation"] = trainer.validate()
            if row["validation"] < lowest:
                lowest = row["validation"]
                save_weights(trainer.model.encoder_q, chosen.encoder_file)
        rows.append(row)
    for run in (chosen, last):
        atomic_write(run.history_file, functools.partial(pd.DataFrame(rows).to_csv, index=False))
    save_weights(trainer.model.encoder_q, last.encoder_file)
    return chosen, last


def _observed(trainer: Trainer) -> dict[str, float]:
    """Train one step; its InfoNCE beside the log of the number of keys to choose from."""
    output = trainer.train_step()
    guessing = float(np.log(output.logits.shape[1]))
    return {"step": trainer.step, "info_nce": output.terms["info_nce"].item(), "guessing": guessing}


def share_of_guessing(history: pd.DataFrame) -> float:
    """InfoNCE of some steps as a share of what guessing costs; 1 says that nothing is learnt yet."""
    return float(history["info_nce"].sum() / history["guessing"].sum())


def training_validation(setting: Setting) -> Iterator[dict]:
    """O6: random first keys, validation that trains, and the checkpoint it chooses, against none of these."""
    subsets, last, chosen = setting.sound_subsets(FEW), {}, {}
    for arm in setting.all_arms:
        recipe, sound = setting.recipe(arm), setting.linear_auc(setting.run(arm), subsets)
        best, final = pretrain_as_released(recipe, setting.data, setting.runs_dir)
        history, trainer = best.history(), Trainer(recipe, setting.data, resolve_device("auto"))
        first = max(2, recipe.queue // trainer.batch)  # as long as random keys are in the queue
        early = pd.DataFrame([_observed(trainer) for _ in range(first)])
        yield _row(EARLY, share_of_guessing(history[:first]), share_of_guessing(early), arm)
        yield _row("step of the checkpoint", history["step"][history["validation"].idxmin()], recipe.steps, arm)
        chosen[arm] = setting.linear_auc(best, subsets), sound
        last[arm] = setting.linear_auc(final, subsets), sound
    yield from _by_arm(f"{LINEAR}, chosen checkpoint", chosen)
    yield from _by_arm(f"{LINEAR}, last step", last)


def absolute_bandwidth(setting: Setting) -> Iterator[dict]:
    """A1: RBF-CKA with an absolute sigma before against after fine-tuning, against debiased linear CKA, with nulls."""
    tables = {arm: _reuse(setting, setting.run(arm)) for arm in setting.all_arms}
    for name, stage in itertools.product(("CKA", "CKA with rows permuted"), STAGES):
        values = {arm: tuple(table.loc[stage, [f"{name} as released", name]]) for arm, table in tables.items()}
        yield from _by_arm(f"{name}, stage {stage}", values)
    for arm, table in tables.items():
        released, relative = table.loc[STAGES[-1], ["CKA as released", "relative"]]
        yield _row(f"CKA, stage {STAGES[-1]}, sound with a relative bandwidth", released, relative, arm)
    every = pd.concat(tables)
    # Numbers that are all equal have no order, so nothing of the sound one is kept.
    kept = np.nan_to_num(every["CKA as released"].corr(every["CKA"], method="spearman"))
    yield _row("rank correlation with the sound order", kept, 1)


def _reuse(setting: Setting, run: Run) -> pd.DataFrame:
    """Per stage, similarity of the test features before and after fine-tuning on a tenth of the labels."""
    data, rows = setting.data, setting.data.rows("test")
    after = fine_tuned(run, data, setting.plan.fractions[-2], 0, setting.plan)[0].encoder
    permuted = np.random.default_rng(setting.seed).permutation(len(rows))
    found = {}
    pairs = zip(*(stage_features(encoder, data, rows) for encoder in (run.load_encoder(), after)), strict=True)
    for stage, (x, y) in zip(STAGES, pairs, strict=True):
        found[stage] = {
            "CKA as released": released_cka(x, y)[0],
            "CKA": cka(x, y),
            "CKA with rows permuted as released": released_cka(x, y[permuted])[0],
            "CKA with rows permuted": cka(x, y[permuted]),
            "relative": cka(x, y, "rbf"),
        }
    return pd.DataFrame.from_dict(found, orient="index")


CONTROLS: dict[str, Callable[[Setting], Iterator[dict]]] = {
    "E1": label_draw,
    "E2": lost_augmentation,
    "E4": interval_width,
    "O3": unequal_starts,
    "O6": training_validation,
    "A1": absolute_bandwidth,
}


# What the figure shows of each control: the property, a quantity of the table, and the text of its axis.
SHOWN = {
    "E1": ("labels drawn with duplicates from the first rows", LINEAR, LINEAR),
    "E2": (
        "fewer labels also mean no augmentation",
        "gain from 10% to 100% of the labels",
        "AUC with 100% of the labels minus AUC with 10%",
    ),
    "E4": (
        "an interval of 1.96 std / sqrt(R) from R resamples",
        "share of comparisons clear of zero",
        "share of comparisons with MoCo clear of zero",
    ),
    "O3": (
        "MoCo and its variants start differently",
        UNEQUAL,
        f"{LINEAR} minus MoCo's; soundly none with zero init",
    ),
    "O6": (
        "validation trains and chooses the checkpoint",
        f"{LINEAR}, chosen checkpoint",
        f"{LINEAR} of the checkpoint",
    ),
    "A1": (
        "RBF-CKA with an absolute bandwidth",
        "CKA with rows permuted, stage 4",
        "CKA of stage 4 with unrelated rows (0 is right)",
    ),
}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Every quantity of the controls, averaged over seeds, and how far the released way moves it.

    Returns:
        One row per code, dataset, quantity and arm: means as released and soundly, their difference `moved` with its
        95% Student-t interval over seeds (NaN for one seed), and whether that is clear of zero.
    """
    rows = []
    for key, part in table.groupby(["code", "dataset", "quantity", "arm"], sort=False):
        each = part["as_released"] - part["sound"]
        low, high = interval(each)
        about = dict(zip(("code", "dataset", "quantity", "arm"), key, strict=True))
        means = {"as released": part["as_released"].mean(), "soundly": part["sound"].mean(), "moved": each.mean()}
        rows.append(about | means | {"low": low, "high": high, "clear": low > 0 or high < 0})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Figure:
    """One panel per code: every seed as released and soundly, the means joined and their difference written beside."""
    parts = []
    for code, (title, quantity, label) in SHOWN.items():
        part = table[(table["code"] == code) & (table["quantity"] == quantity)]
        name = part["dataset"] + ", " + part["arm"]
        parts.append(part.assign(panel=f"{code}: {title}", label=label, name=name))
    dots = pd.concat(parts).melt(["panel", "name"], ["as_released", "sound"], "way")
    return panels(dots, "value", "name", "way", "The same question, as released and soundly", join=False, share=False)
