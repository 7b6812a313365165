"""`Recipe`: every hyper-parameter of one pretraining, and the arms and presets that fill it in."""

import dataclasses
import hashlib
import inspect
import json
import re
from dataclasses import dataclass, field

MSE = {"pool": (4, 4, 1, 1), "scale_free": False, "standardized": False}
BARLOW = {"projector": 512, "off_diagonal": 1.0, "scale": 1 / 32}
QUARTERS = (0.25,) * 4
# The fields that an arm sets. Add an entry for a loss of your own: its `stage_loss` is the class itself.
ARMS: dict[str, dict] = {
    "random": {"steps": 0},
    "supervised": {"steps": 0},
    "moco": {},
    "mse": {"stage_loss": "mse", "stage_weights": QUARTERS, "stage_options": MSE},
    "barlow": {"stage_loss": "barlow", "stage_weights": (5e-5,) * 4, "stage_options": BARLOW},
    "mse-normalized": {"stage_loss": "mse", "stage_weights": QUARTERS, "stage_options": MSE | {"scale_free": True}},
    "barlow-conditioned": {
        "stage_loss": "barlow",
        "stage_weights": (0.01,) * 4,
        "stage_options": BARLOW | {"projector": 128, "off_diagonal": 0.0051},
    },
    # Ours, after the paper's idea; not what its claims are about.
    "mse-standardized": {"stage_loss": "mse", "stage_weights": QUARTERS, "stage_options": MSE | {"standardized": True}},
}
PRETRAINED_ARMS = tuple(arm for arm, fields in ARMS.items() if fields.get("steps") != 0)
CHOICES = {
    "layout": ("resnet10", "resnet18", "resnet34", "resnet50"),
    "stem": ("small", "imagenet"),
    "zero_init_residual": (False, True),
    "released_order": (False, True),
    "head": ("linear", "mlp"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
}
MOST = 2**32 - 1  # of every number: the largest that all libraries take as a seed
LEAST, NEARLY_1 = 1e-12, 0.999999
# From where to where numbers of a recipe and its views may be; colder, single precision loses what a step changes.
RANGES = {"seed": (0, MOST), "steps": (0, MOST), "batch": (2, MOST), "temperature": (1e-4, MOST), "lr": (LEAST, MOST)}
RANGES |= dict.fromkeys(("channels", "side", "width", "dim", "queue", "bn_splits"), (1, MOST))
RANGES |= dict.fromkeys(("monitor_every", "log_every"), (1, MOST))
RANGES |= dict.fromkeys(("momentum", "sgd_momentum"), (0, NEARLY_1))
RANGES |= dict.fromkeys(("hflip", "vflip", "jitter", "gray", "blur"), (0, 1))
RANGES |= dict.fromkeys(("weight_decay", "rotation", "brightness", "contrast", "saturation", "hue"), (0, MOST))
RANGES |= {"crop": (LEAST, 1), "ratio": (LEAST, MOST)}


def _demand(name: str, value: object, holds: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} cannot be trained; give {allowed}")


def _number(value: object, least: float = 0, most: float = MOST, kind: type | tuple = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def _check_fields(settings: object) -> None:
    """Refuse a field outside its `RANGES` or `CHOICES`."""
    for about in dataclasses.fields(settings):
        name, value, whole = about.name, getattr(settings, about.name), about.type is int
        if name in RANGES:
            least, most = RANGES[name]
            allowed = f"a {'whole ' if whole else ''}number from {least} to {most}"
            _demand(name, value, _number(value, least, most, int if whole else (int, float)), allowed)
        elif name in CHOICES:
            _demand(name, value, value in CHOICES[name], " or ".join(map(str, CHOICES[name])))


def _alike(value: object, good: object) -> bool:
    """Whether an option's value is of the same kind as a good one: sizes, a switch, a size or a number."""
    if isinstance(good, tuple):
        return isinstance(value, (tuple, list)) and len(value) == len(good) and all(_alike(side, 1) for side in value)
    if isinstance(good, bool):
        return isinstance(value, bool)
    return _number(value, 1, kind=int) if isinstance(good, int) else _number(value)


@dataclass(frozen=True)
class Views:
    """How a random view of an image is made; a probability or range of 0 switches an augmentation off."""

    crop: float = 1.0  # smallest share of the area that a random crop keeps; 1 switches cropping off
    ratio: float = 4 / 3  # aspect ratios of the crop lie in [1/ratio, ratio]
    rotation: float = 0.0  # degrees; the angle is uniform in [-rotation, rotation]
    hflip: float = 0.0  # probabilities of a mirror image
    vflip: float = 0.0
    brightness: float = 0.4  # ranges of four changes of colour, as in torchvision's ColorJitter
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8  # probability of the four together
    gray: float = 0.2  # probability of dropping colour
    blur: float = 0.5  # probability of a Gaussian blur
    sigma: tuple[float, float] = (0.1, 2.0)  # range of the blur's standard deviation in pixels
    released_order: bool = False  # colours and blur first, then the geometry, with rotation to the nearest pixel

    def __post_init__(self) -> None:
        _check_fields(self)
        pair = isinstance(self.sigma, (tuple, list)) and len(self.sigma) == 2 and all(map(_number, self.sigma))
        ordered = pair and 0 <= self.sigma[0] <= self.sigma[1] > 0
        _demand("sigma", self.sigma, ordered, "two numbers from 0 up, the lower first")


RELEASED_VIEWS = {
    "chest": Views(rotation=30, released_order=True),
    "histology": Views(crop=0.4, hflip=0.5, released_order=True),
    "retina": Views(rotation=30, hflip=0.5, released_order=True),
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

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    arm: str  # a key of `ARMS`
    dataset: str  # which images, as the three below; see `MedicalImages`
    fingerprint: str
    channels: int
    side: int
    seed: int = 0  # initial weights, order of images and every view follow from it and from the step number
    layout: str = "resnet10"  # the encoder, as the three below; see `StagedResNet`
    width: int = 16
    stem: str = "small"
    zero_init_residual: bool = False
    head: str = "mlp"  # from the embedding to `dim` numbers: "mlp" (MoCo v2) or "linear" (as released)
    dim: int = 128
    queue: int = 1024  # how many keys it holds
    momentum: float = 0.996  # share of the key encoder that stays in every step
    temperature: float = 0.1
    bn_splits: int = 2  # groups into which a batch is cut for batch-norm, against the leak between query and key
    stage_loss: str = "none"  # "mse", "barlow", or the `loss_name` of a class
    stage_weights: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # lambda of each of the four stages
    stage_options: dict = field(default_factory=dict, hash=False)  # of the stage loss, e.g. `pool` of `StageMSE`
    views: Views = field(default_factory=Views)
    batch: int = 128
    steps: int = 200
    lr: float = 0.06  # of SGD
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"  # to zero; or "constant"
    precision: str = "auto"  # "fp32" or "bf16", see `autocast_type`
    monitor_every: int = 50  # steps between two monitors with kNN and gradient shares
    log_every: int = 10  # steps between two rows of history
    init: str = ""  # fingerprint of the weights that the encoder starts from; "" is random

    def __post_init__(self) -> None:
        _check_fields(self)
        trained = "0" if _untrained(self.arm) else "1 or more"
        _demand("steps", self.steps, _untrained(self.arm) == (self.steps == 0), f"the arm {self.arm} {trained}")
        group, rest = divmod(self.batch, self.bn_splits)
        allowed = f"equal groups of 2 or more images of batch={self.batch}"
        _demand("bn_splits", self.bn_splits, group > 1 and not rest, allowed)
        named = re.fullmatch(r"none|mse|barlow|\w+-[0-9a-f]{8}", str(self.stage_loss))
        _demand("stage_loss", self.stage_loss, named, "none, mse, barlow, or a class in ARMS")
        weights = self.stage_weights
        four = isinstance(weights, (tuple, list)) and len(weights) == 4 and all(map(_number, weights))
        _demand("stage_weights", weights, four, "four numbers from 0 up")
        _demand("views", self.views, isinstance(self.views, Views), "a Views")
        _demand("stage_options", self.stage_options, isinstance(self.stage_options, dict), "a dictionary")
        _demand("init", self.init, isinstance(self.init, str), "the fingerprint of a file")
        if known := {"mse": MSE, "barlow": BARLOW}.get(self.stage_loss):
            for name, value in self.stage_options.items():
                _demand(name, value, name in known and _alike(value, known[name]), f"something like {known}")

    @property
    def key(self) -> str:
        """Twelve characters that name the run; two recipes share them only if they are equal in every field."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)


SMALL = {
    "smoke": {"width": 8, "batch": 64, "steps": 30, "queue": 256, "monitor_every": 15, "log_every": 5},
    "lesson": {},
}
# Not known or not taken over: the number of epochs (100 is ours, the released default allows 1,000); our queue starts
# empty, the released one with random keys; all arms start alike, the released variants with zero_init_residual.
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
RELEASED_EPOCHS = 100
RELEASED_BATCH = {"chest": 16, "histology": 32, "retina": 8}
RELEASED_POOL = {"chest": (16, 16, 4, 4), "histology": (1, 1, 1, 1), "retina": (16, 16, 4, 4)}
RELEASED_PROJECTOR = 2048


@dataclass(frozen=True)
class Evaluation:
    """How encoders are judged; the same for every arm."""

    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the labels
    subsets: int = 5  # of labels per seed for linear evaluation below 100%; fine-tuning uses the first ones
    penalties: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of the logistic regression, chosen on validation
    epochs: int = 1  # fine-tuning reads its labelled images this often,
    least_steps: int = 60  # and takes at least so many steps
    batch: int = 32
    lr: float = 1e-3  # of Adam
    checks: int = 4  # how often fine-tuning is looked at on validation, at equal distances; the best one is tested
    most_validation_rows: int = 300  # images per look
    resamples: int = 500  # of patients, for a 95% interval


EVALUATIONS = {
    "smoke": Evaluation(
        subsets=1, penalties=(0.01, 1.0), batch=64, least_steps=6, checks=2, most_validation_rows=100, resamples=100
    ),
    "lesson": Evaluation(),
    # Adam, its rate and the batch as released. The released "at most 100 epochs" are about 5,000 steps at 1% of NIH;
    # with all labels 100 epochs are half a million. Ten epochs, but at least 5,000 steps, are our choice.
    "paper": Evaluation(epochs=10, least_steps=5_000, batch=16, checks=50, most_validation_rows=5_000),
}
PRESETS = tuple(EVALUATIONS)


def preset(name: str, arm: str, data, seed: int | None = None, /, **changes) -> Recipe:
    """The recipe of an arm on a data set.

    Args:
        name: "smoke" (seconds), "lesson" (a minute or so on two cores) or "paper" (the released recipe, for GPUs).
        arm: a key of `ARMS`.
        data: a `MedicalImages`; its size, channels, modality and fingerprint are taken over.
        seed: see `Recipe`; 0 if it is left out.
        changes: fields of `Recipe`, or options of the arm's stage loss, e.g. `temperature=0.2, projector=64`.
    Raises:
        ValueError: an unknown preset, arm or field, with the known ones; or see `Recipe`.
    """
    for value, known in ((name, PRESETS), (arm, ARMS)):
        if value not in known:
            raise ValueError(f"{value!r} is unknown; choose one of {', '.join(known)}")
    names = {about.name for about in dataclasses.fields(Recipe)}
    if wrong := sorted(set(ARMS[arm]) - names):
        raise ValueError(f"the arm {arm} sets {wrong[0]!r}, which is no field of a recipe; mend its entry in ARMS")
    if twice := sorted(names & set(ARMS[arm].get("stage_options", {})) & set(changes)):
        raise ValueError(f"{twice[0]!r} is a field of every recipe and an option of {arm}: change it in ARMS")
    about = {"arm": arm, "dataset": data.name, "fingerprint": data.fingerprint}
    about |= {"channels": data.channels, "side": data.side} | ({} if seed is None else {"seed": seed})
    released = name not in SMALL
    fields = _released(data, changes.get("batch")) if released else SMALL[name] | {"views": _views(LESSON_VIEWS, data)}
    fields |= ARMS[arm]
    options = dict(fields.get("stage_options", {}))
    if released and fields.get("stage_loss") == "mse":
        options["pool"] = RELEASED_POOL.get(data.modality, RELEASED_POOL["chest"])
    if released and arm == "barlow":
        options["projector"] = RELEASED_PROJECTOR
    if isinstance(fields.get("stage_loss"), type):
        fields["stage_loss"] = loss_name(fields["stage_loss"])
    # All but what makes the arm and its data what they are.
    known = sorted(names - {*about, "stage_loss", "stage_options"}) + sorted(options)
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"{unknown[0]!r} cannot be changed in a recipe of {arm}; what can: {', '.join(known)}")
    fields["stage_options"] = options | {option: changes.pop(option) for option in options if option in changes}
    untrained = {"steps": 0} if _untrained(arm) else {}  # whatever the steps of the other arms are changed to
    return Recipe(**fields | changes | about | untrained)


def _untrained(arm: str) -> bool:
    return ARMS.get(arm, {}).get("steps") == 0


def loss_name(loss: type) -> str:
    """`NAME-HASH` of a class of one's own, with a hash of its file or cell: an edited loss is another run."""
    try:  # Python does not find a class that was defined in a notebook, but it does find its methods
        method = next(part for part in vars(loss).values() if inspect.isfunction(part))
        source, _ = inspect.findsource(method)
    except (OSError, StopIteration):
        raise ValueError(f"Python has no source of {loss.__name__}; define it in a cell or a file") from None
    return f"{loss.__name__}-{hashlib.sha256(''.join(source).encode()).hexdigest()[:8]}"


def _released(data, batch: object) -> dict:
    released = RELEASED_BATCH.get(data.modality, 32)
    per_step = batch if isinstance(batch, int) and batch > 0 else released  # with another one, still as many epochs
    steps = RELEASED_EPOCHS * max(1, len(data.pretraining_rows()) // per_step)
    return RELEASED | {"batch": released, "steps": steps, "views": _views(RELEASED_VIEWS, data)}


def _views(table: dict[str, Views], data) -> Views:
    views = table.get(data.modality, table["chest"])
    return views if data.channels == 3 else dataclasses.replace(views, saturation=0.0, hue=0.0, gray=0.0)
