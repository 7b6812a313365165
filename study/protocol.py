"""Every constant of the study; PROTOCOL.md says why each is what it is."""

from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
TABLES, README = HOME / "study" / "tables", HOME / "README.md"
FIGURE = "low_label.png"
BEGIN, END = "<!-- results: written by `python -m study report` -->", "<!-- end of results -->"

# Data sets
REAL = ("pneumoniamnist", "breast_histology", "nih_finding", "retina")
PRIMARY = ("nih_finding", "breast_histology", "retina")  # one per modality of the paper
OUTSIDE = {"retina": "idrid"}  # a data set of the same kind that judges the encoders of another
TUNED_ON = ("pneumoniamnist", "breast_histology", "nih_finding")
CONTROLLED = ("breast_histology", "retina")  # where the properties of the released code are tried

# Arms
UNTRAINED = ("random", "supervised")  # what MoCo is compared with in linear evaluation, and in fine-tuning
OWN = ("mse-standardized",)  # after the paper's idea; not what its claims are about
STAGE_ARMS = ("mse", "barlow", "mse-normalized", "barlow-conditioned", *OWN)

# Runs
SEEDS = (10, 11, 12, 13, 14)
FINE_TUNINGS = 3  # label subsets per fraction below 100%


@dataclass(frozen=True)
class Series:
    """One grid of runs: data sets x arms x `SEEDS`."""

    title: str  # in sentences and figures
    datasets: tuple[str, ...] = REAL
    arms: tuple[str, ...] = (*UNTRAINED, "moco", *STAGE_ARMS)
    longer: int = 1  # times as many steps as the preset has
    changes: dict = field(default_factory=dict)  # fields of the recipe, in every arm
    analyses: bool = False  # also probe every stage, and compare features and outputs


LARGER_ARMS = (*UNTRAINED, "moco", "mse", "barlow-conditioned", *OWN)
SERIES = {
    "first": Series("first series", analyses=True),
    "long": Series("longer training", arms=("moco", "mse", *OWN), longer=3),
    "larger": Series("longer training, 64 px", PRIMARY, LARGER_ARMS, longer=3, changes={"stem": "imagenet"}),
}

# Tuning: learning rate, temperature and crop take the same values in the same trial of every arm.
TRIALS = 8
TUNING_SEED = 100  # of all trials; no reported run has it
TUNING_SUBSETS = 10
AS_MOCO = ("mse", "barlow")  # keep their released stage weights and get MoCo's choice for the rest
TUNED = ("moco", "mse-normalized", "barlow-conditioned", "mse-standardized")
SHARED = {"lr": (0.03, 0.06, 0.12), "temperature": (0.1, 0.2), "crop": (0.2, 0.4, 0.7)}
STAGES_ON = ((1, 1, 1, 1), (0, 1, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0))
WEIGHTS = {"mse-normalized": (0.1, 3.0), "barlow-conditioned": (0.003, 0.3), "mse-standardized": (0.1, 3.0)}
WARM_UP = {"mse-standardized": (0.0, 0.5)}

# Judging
CLAIM = 0.05  # the gain at 1% of the labels that the paper reports on the average of its data sets
MARGIN = 0.01  # a difference that is surely smaller counts as none
LEVEL = 0.05
EARLY = (1, 2)  # stages
NEAR_CHANCE = 0.6
NAMES = {"linear": "Linear evaluation", "finetune": "Fine-tuning"}

# Columns of tables: what arms and seeds are compared within, and what names a row.
CELL = ("code", "property", "judged_on", "quantity", "protocol", "source", "stage", "fraction")
KEYS = ("series", "dataset", *CELL, "class", "arm", "trial", "seed", "subset")
