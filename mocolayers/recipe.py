"""`Recipe`: every hyper-parameter of one pretraining, and the presets and arms that fill it in."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

ARMS = ("random", "supervised", "moco", "mse", "barlow", "mse-normalized", "barlow-conditioned", "mse-standardized")


OWN_ARMS = ("mse-standardized",)  # ours, after the paper's idea; not what its claims are about


PRETRAINED_ARMS = tuple(arm for arm in ARMS if arm not in ("random", "supervised"))


PRESETS = ("smoke", "lesson", "paper", "paper-sound")


@dataclass(frozen=True)
class Views:
    """How a random view of an image is made; a probability or range of 0 switches an augmentation off.

    Attributes:
        crop: smallest share of the area that a random crop keeps; 1 switches cropping off.
        ratio: aspect ratios of the crop lie in [1/ratio, ratio].
        rotation: degrees; the angle is uniform in [-rotation, rotation].
        hflip, vflip: probabilities of a mirror image.
        brightness, contrast, saturation, hue: ranges as in torchvision's ColorJitter.
        jitter: probability of the four together.
        gray: probability of dropping colour.
        blur: probability of a Gaussian blur.
        sigma: range of the blur's standard deviation in pixels.
    """

    crop: float = 1.0
    ratio: float = 4 / 3
    rotation: float = 0.0
    hflip: float = 0.0
    vflip: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)


RELEASED_VIEWS = {
    "chest": Views(rotation=30),
    "histology": Views(crop=0.4, hflip=0.5),
    "retina": Views(rotation=30, hflip=0.5),
}


# At 28 to 64 px a blur of 2 px wipes the image out, and without crops the views are too easy to tell apart.
LESSON_VIEWS = {
    "chest": Views(crop=0.4, rotation=10, gray=0, blur=0.5, sigma=(0.1, 0.8)),
    "histology": Views(crop=0.4, hflip=0.5, vflip=0.5, blur=0.5, sigma=(0.1, 0.8)),
    "retina": Views(crop=0.4, rotation=30, hflip=0.5, blur=0.5, sigma=(0.1, 0.8)),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a pretraining ends with.

    Attributes:
        arm: one of `ARMS`; the fields below `arm` say what it means.
        dataset, fingerprint, channels, side: which images, see `MedicalImages`.
        seed: initial weights, order of images and every view follow from it and from the step number.
        layout, width, stem, zero_init_residual: the encoder, see `StagedResNet`.
        head: "linear" (as released) or "mlp" (MoCo v2) from the embedding to `dim` numbers.
        queue, momentum, temperature: MoCo's three, see `MoCo`.
        bn_splits: groups into which a batch is cut for batch-norm, against the leak between query and key.
        stage_loss: "none", "mse" or "barlow".
        stage_weights: lambda for each of the four stages.
        stage_warmup: share of the steps over which the stage losses grow linearly from 0 to their weights.
        pool, scale_free, standardized: for "mse", see `StageMSE`.
        projector, off_diagonal, scale: for "barlow", see `StageBarlow`.
        batch, steps, lr, sgd_momentum, weight_decay, schedule: SGD; "cosine" to zero or "constant".
        init: fingerprint of the weights that the encoder starts from, see `runs.initial_weights`; "" is random.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the processor has instructions for it.
        monitor_every, log_every: steps between two monitors with kNN and gradient shares, and two rows of history.
    """

    arm: str
    dataset: str
    fingerprint: str
    channels: int
    side: int
    seed: int = 0
    layout: str = "resnet10"
    width: int = 16
    stem: str = "small"
    zero_init_residual: bool = False
    head: str = "mlp"
    dim: int = 128
    queue: int = 1024
    momentum: float = 0.996
    temperature: float = 0.1
    bn_splits: int = 2
    stage_loss: str = "none"
    stage_weights: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    pool: tuple[int, ...] = ()
    scale_free: bool = False
    projector: int = 0
    off_diagonal: float = 1.0
    scale: float = 1.0
    views: Views = field(default_factory=Views)
    batch: int = 128
    steps: int = 200
    lr: float = 0.06
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    precision: str = "auto"
    monitor_every: int = 50
    log_every: int = 10
    init: str = ""
    standardized: bool = False
    stage_warmup: float = 0.0

    @property
    def key(self) -> str:
        """Twelve characters that name the run; two recipes share them only if they are equal in every field."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        for name in ("init", "standardized", "stage_warmup"):
            if not fields[name]:  # runs that were trained before these fields were there keep their names
                del fields[name]
        return json.dumps(fields, sort_keys=True, indent=1)


SMALL = {
    "smoke": {"width": 8, "batch": 64, "steps": 30, "queue": 256, "monitor_every": 15, "log_every": 5},
    "lesson": {},
}


RELEASED = {
    "layout": "resnet50",
    "width": 64,
    "stem": "imagenet",
    "head": "linear",
    "queue": 65_536,
    "momentum": 0.999,
    "temperature": 0.07,
    "bn_splits": 1,
    "lr": 0.03,
    "weight_decay": 1e-4,
    "schedule": "constant",
    "monitor_every": 2_000,
    "log_every": 100,
}


RELEASED_BATCH = {"chest": 16, "histology": 32, "retina": 8}


RELEASED_SIDE = {"chest": 512, "histology": 255, "retina": 299}


SOUND_BATCH = 32


SOUND_QUEUE = 4  # the queue holds at most one image in so many


@dataclass(frozen=True)
class Evaluation:
    """How encoders are judged; the same for every arm.

    Attributes:
        fractions: label fractions.
        subsets: label subsets per seed for linear evaluation below 100%; fine-tuning uses the first, or the first few.
        penalties: candidates for the inverse strength C of the logistic regression, chosen on validation.
        epochs, least_steps: fine-tuning reads its labelled images this often, and takes at least so many steps.
        batch, lr: of fine-tuning with Adam.
        checks: how often it is looked at validation, at equal distances; the best one is tested.
        most_validation_rows: validation images per look.
        resamples: bootstrap resamples of patients for a 95% interval.
    """

    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    subsets: int = 5
    penalties: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    epochs: int = 1
    least_steps: int = 60
    batch: int = 32
    lr: float = 1e-3
    checks: int = 4
    most_validation_rows: int = 300
    resamples: int = 500


EVALUATIONS = {
    "smoke": Evaluation(
        subsets=1, penalties=(0.01, 1.0), batch=64, least_steps=6, checks=2, most_validation_rows=100, resamples=100
    ),
    "lesson": Evaluation(),
    # Adam, its rate and the batch as released. The released "at most 100 epochs" are about 5,000 steps at 1% of NIH;
    # with all labels 100 epochs are half a million. Ten epochs, but at least 5,000 steps, are our choice.
    "paper": Evaluation(epochs=10, least_steps=5_000, batch=16, checks=50, most_validation_rows=5_000),
}


EVALUATIONS["paper-sound"] = EVALUATIONS["paper"]


def preset(name: str, arm: str, data, seed: int = 0, **changes) -> Recipe:
    """The recipe of an arm on a data set.

    Args:
        name: "smoke" (seconds), "lesson" (a minute or so on two cores), "paper" (the released recipe, for GPUs) or
            "paper-sound" (the same without the leaks that the released one leaves open, see `_sound`).
        arm: one of `ARMS`.
        data: a `MedicalImages`; its size, channels, modality and fingerprint are taken over.
        seed: see `Recipe`.
        changes: any field of `Recipe` to set otherwise, e.g. `temperature=0.2`.
    Raises:
        ValueError: an unknown preset, arm or field; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    if arm not in ARMS:
        raise ValueError(f"arm {arm!r} is unknown; choose one of {', '.join(ARMS)}")
    known = {f.name for f in dataclasses.fields(Recipe)}
    if unknown := set(changes) - known:
        raise ValueError(f"a recipe has no field {sorted(unknown)[0]!r}; the fields are {', '.join(sorted(known))}")
    fields = SMALL[name] | {"views": _views(LESSON_VIEWS, data)} if name in SMALL else _released(data)
    if name == "paper-sound":
        fields |= _sound(data, fields["batch"])
    fields = fields | _stage_loss(arm, name)
    about = {"dataset": data.name, "fingerprint": data.fingerprint, "channels": data.channels, "side": data.side}
    untrained = {} if arm in PRETRAINED_ARMS else {"steps": 0}  # whatever the others' steps are changed to
    return Recipe(**{"arm": arm, "seed": seed} | about | fields | changes | untrained)


def _released(data) -> dict:
    batch = RELEASED_BATCH.get(data.modality, 32)
    return RELEASED | {"batch": batch, "steps": _epochs(data, batch), "views": _views(RELEASED_VIEWS, data)}


def _sound(data, batch: int) -> dict:
    """What the released recipe leaves open on one device, closed.

    Batch-norm in two groups with the keys shuffled closes the leak between query and key; groups of at least 16 images
    need a batch of 32. A queue of at most n/4 of n images holds an image's own stale key for about 3% of the queries,
    (1/4)^2 / 2, instead of up to all of them.
    """
    images, batch = len(data.pretraining_rows()), max(batch, SOUND_BATCH)
    queue = max(batch, min(RELEASED["queue"], images // SOUND_QUEUE))
    return {"bn_splits": 2, "batch": batch, "steps": _epochs(data, batch), "queue": queue}


def _epochs(data, batch: int, count: int = 100) -> int:
    """Steps of `count` epochs. The released code counts epochs; its number of them is not known, 100 is our choice."""
    return count * max(1, len(data.pretraining_rows()) // batch)


def _views(table: dict[str, Views], data) -> Views:
    views = table.get(data.modality, table["chest"])
    return views if data.channels == 3 else dataclasses.replace(views, saturation=0.0, hue=0.0, gray=0.0)


def _stage_loss(arm: str, name: str) -> dict:
    """What an arm adds to MoCo. The lesson keeps the released pooling relative to the map, and a projector of four
    batches' width instead of 64 to 256, which two cores can train."""
    released = name not in SMALL
    pool = (16, 16, 4, 4) if released else (4, 4, 1, 1)
    arms = {
        "mse": {"stage_loss": "mse", "stage_weights": (0.25,) * 4, "pool": pool},
        "mse-normalized": {"stage_loss": "mse", "stage_weights": (0.25,) * 4, "pool": pool, "scale_free": True},
        "mse-standardized": {"stage_loss": "mse", "stage_weights": (0.25,) * 4, "pool": pool, "standardized": True},
        "barlow": {
            "stage_loss": "barlow",
            "stage_weights": (5e-5,) * 4,
            "projector": 2048 if released else 512,
            "off_diagonal": 1.0,
            "scale": 1 / 32,
        },
        "barlow-conditioned": {
            "stage_loss": "barlow",
            "stage_weights": (0.01,) * 4,
            "projector": 128,
            "off_diagonal": 0.0051,
            "scale": 1 / 32,
        },
    }
    return arms.get(arm, {})
