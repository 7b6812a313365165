"""Every constant of the study; PROTOCOL.md says why each is what it is."""

from dataclasses import dataclass, field
from pathlib import Path

from mocolayers.recipe import RELEASED, RELEASED_BATCH, RELEASED_VIEWS, Evaluation

HOME = Path(__file__).resolve().parents[1]
TABLES, README, PAGE = HOME / "study" / "tables", HOME / "README.md", HOME / "study" / "README.md"
FIGURE = "low_label.png"
BEGIN, END = "<!-- results: written by `python -m study report` -->", "<!-- end of results -->"

# Data sets
LIKE = {"chest": "pneumonia", "histology": "breast_histology", "retina": "aptos"}
PRIMARY = tuple(LIKE.values())  # one per modality of the paper
GRADED, SMALLEST = ("aptos",), 48  # of these the graded ones are ordinal, the others binary; pixels
OUTSIDE = {"aptos": "idrid"}  # a data set of the same kind that judges the encoders of another
CONTROLLED = ("breast_histology", "aptos")  # where the properties of the released code are tried

# A repetition draws its own split, by patient: ten folds, of which two are tested and one validates.
FOLDS, TEST_FOLDS = 10, 2
RATIO = TEST_FOLDS / (FOLDS - TEST_FOLDS - 1)  # test images per training image
REPETITIONS = tuple(range(12))
TUNING = (100, 101, 102)  # seeds whose test patients are set apart: no repetition tests on them
FINE_TUNINGS = 3  # label subsets per fraction below 100%; linear evaluation has `Evaluation.subsets`
FEW = (0.01, 0.1)  # fractions of the labels that the claims are about; the paper's 1% are as many labels as our 10%

# Arms
UNTRAINED = ("random", "supervised")  # what MoCo is compared with in linear evaluation, and in fine-tuning
OWN = ("mse-standardized",)  # after the paper's idea; not what its claims are about
STAGE_ARMS = ("mse", "barlow", "mse-normalized", "barlow-conditioned", *OWN)
LEADING = ("mse", "barlow-conditioned")  # the primary family
# A repetition is complete when it has these at their own weights.
EVERYWHERE = (*UNTRAINED, "moco", "mse", "barlow", "barlow-conditioned")

# What all arms of a data set share. The gate chooses among the candidates; "longer" is in units of a scale's steps.
WEAK = {"hue": 0.02, "saturation": 0.1, "brightness": 0.2, "contrast": 0.2, "gray": 0.0, "blur": 0.2}
CANDIDATES = {
    "preset": {},
    "short": {"longer": 1 / 3},
    "weak": {"views": WEAK},
    "weak-large-crops": {"views": WEAK | {"crop": 0.6}},
    "weak-small-crops": {"views": WEAK | {"crop": 0.2}},
    "weak-warm": {"views": WEAK, "temperature": 0.2},
    "weak-long": {"views": WEAK, "longer": 2},
}
SWEEPS = 2  # of the tuning seeds try the weights
# Stage weights are multiplied by these; what share of the gradient that gives is measured.
WEIGHTS = {
    "mse": (1, 3, 12, 60),
    "mse-standardized": (0.05, 0.25, 1, 3),
    "barlow": (1, 5, 15, 50),
    "barlow-conditioned": (1, 6, 20, 70),
}


def released_changes(modality: str, arm: str) -> dict:
    """The released recipe scaled down, for the setting "released": its views and its initial states."""
    same = ("head", "momentum", "temperature", "bn_splits", "lr", "weight_decay", "schedule")
    views = vars(RELEASED_VIEWS.get(modality, RELEASED_VIEWS["chest"]))
    changes = {name: RELEASED[name] for name in same} | {"batch": RELEASED_BATCH.get(modality, 32), "queue": 4096}
    return changes | {"zero_init_residual": arm != "moco", "longer": 10 / 3, "views": views}


@dataclass(frozen=True)
class Scale:
    """How large every run of the study is."""

    preset: str
    plan: Evaluation
    fields: dict = field(default_factory=dict)  # of the recipe, in every arm
    repetitions: tuple[int, ...] = REPETITIONS
    tuning: tuple[int, ...] = TUNING


# fp32, since "auto" would mean another arithmetic on another processor.
SMALL = {"stem": "imagenet", "precision": "fp32", "steps": 1500, "monitor_every": 250, "log_every": 50}
PLAN = Evaluation(subsets=10, least_steps=200, resamples=100)
SCALES = {
    "smoke": Scale(
        "smoke",
        Evaluation(subsets=2, penalties=(0.1,), least_steps=4, checks=2, most_validation_rows=100, resamples=20),
        {"stem": "imagenet", "precision": "fp32", "steps": 12, "monitor_every": 6, "log_every": 6},
        repetitions=(0, 1),
        tuning=TUNING[:1],
    ),
    "cpu": Scale("lesson", PLAN, SMALL),
    "gpu": Scale(
        "lesson",
        PLAN,
        {"layout": "resnet18", "width": 64, "stem": "imagenet", "steps": 2500, "monitor_every": 500, "log_every": 100},
        repetitions=REPETITIONS[:5],
    ),
}
SERIES = {
    "gate": "does MoCo beat no pretraining?",
    "weights": "how hard should the stage losses pull?",
    "comparison": "do they beat MoCo?",
    "conditions": "do they beat MoCo with the settings of the paper's released code?",
}

# Judging
CLAIM = 0.05  # the gain at 1% of the labels that the paper reports on the average of its data sets
MARGIN = 0.01  # of "equal", see `report.verdict`
LEVEL = 0.05
EARLY = (1, 2)  # stages
NAMES = {"linear": "Linear evaluation", "finetune": "Fine-tuning"}

# Columns of tables: what arms and seeds are compared within, and what names a row.
CELL = ("code", "property", "judged_on", "quantity", "protocol", "source", "stage", "fraction")
KEYS = ("scale", "series", "dataset", "setting", *CELL, "class", "arm", "weight", "seed", "subset")
