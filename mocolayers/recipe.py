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
    "head": ("linear", "mlp"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
MOST = 2**32 - 1  # of every number: the largest that all libraries take as a seed
COLDEST, SLOWEST = 1e-4, 1e-12  # temperature and rate below which single precision loses the step
LEAST = {"seed": 0, "steps": 0, "batch": 2} | dict.fromkeys(
    ("channels", "side", "width", "dim", "queue", "bn_splits", "monitor_every", "log_every"), 1
)


def _demand(settings: object, name: str, holds: object, allowed: str) -> None:
    if not holds:
        value = vars(settings)[name] if name in vars(settings) else settings.stage_options[name]
        raise ValueError(f"{name}={value!r} cannot be trained; give {allowed}")


def _untrained(arm: str) -> bool:
    return ARMS.get(arm, {}).get("steps") == 0


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST


def _alike(value: object, good: object) -> bool:
    """Whether an option's value is of the same kind as a good one: sizes, a switch, a size or a number."""
    if isinstance(good, tuple):
        return isinstance(value, (tuple, list)) and len(value) == len(good) and all(_whole(side, 1) for side in value)
    if isinstance(good, bool):
        return isinstance(value, bool)
    return _whole(value, 1) if isinstance(good, int) else _number(value)


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
        released_order: colours and blur first, then the geometry, with rotation to the nearest pixel.
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
    released_order: bool = False

    def __post_init__(self) -> None:
        for name in ("crop", "hflip", "vflip", "jitter", "gray", "blur"):
            _demand(self, name, _number(getattr(self, name)) and getattr(self, name) <= 1, "a number from 0 to 1")
        for name in ("crop", "ratio"):
            _demand(self, name, _number(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        for name in ("rotation", "brightness", "contrast", "saturation", "hue"):
            _demand(self, name, _number(getattr(self, name)), "a number from 0 up")


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

    Attributes:
        arm: a key of `ARMS`.
        dataset, fingerprint, channels, side: which images, see `MedicalImages`.
        seed: initial weights, order of images and every view follow from it and from the step number.
        layout, width, stem, zero_init_residual: the encoder, see `StagedResNet`.
        head: "linear" (as released) or "mlp" (MoCo v2) from the embedding to `dim` numbers.
        queue, momentum, temperature: MoCo's three, see `MoCo`.
        bn_splits: groups into which a batch is cut for batch-norm, against the leak between query and key.
        stage_loss: "none", "mse", "barlow", or the `loss_name` of a class.
        stage_weights: lambda for each of the four stages.
        stage_options: arguments of the stage loss, e.g. `pool` of `StageMSE`.
        stage_warmup: share of the steps over which the stage losses grow linearly from 0 to their weights.
        batch, steps, lr, sgd_momentum, weight_decay, schedule: SGD; "cosine" to zero or "constant".
        precision: "fp32", "bf16", "fp16", or "auto", see `autocast_type`.
        monitor_every, log_every: steps between two monitors with kNN and gradient shares, and two rows of history.
        init: fingerprint of the weights that the encoder starts from, see `initial_weights`; "" is random.
    Raises:
        ValueError: naming the field, its value and what is allowed.
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
    stage_options: dict = field(default_factory=dict, hash=False)
    stage_warmup: float = 0.0
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

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            _demand(self, name, getattr(self, name) in allowed, " or ".join(map(str, allowed)))
        for name, least in LEAST.items():
            _demand(self, name, _whole(getattr(self, name), least), f"a whole number from {least} to {MOST}")
        for name in ("momentum", "sgd_momentum"):
            _demand(self, name, _number(getattr(self, name)) and getattr(self, name) < 1, "a number from 0 to below 1")
        for name, least in (("temperature", COLDEST), ("lr", SLOWEST)):
            value = getattr(self, name)
            _demand(self, name, _number(value) and value >= least, f"a number from {least} up")
        _demand(self, "weight_decay", _number(self.weight_decay), "a number from 0 up")
        _demand(self, "stage_warmup", _number(self.stage_warmup) and self.stage_warmup <= 1, "a number from 0 to 1")
        untrained = _untrained(self.arm)
        _demand(
            self, "steps", untrained == (self.steps == 0), f"the arm {self.arm} {'0' if untrained else '1 or more'}"
        )
        group, rest = divmod(self.batch, self.bn_splits)
        _demand(self, "bn_splits", group > 1 and not rest, f"equal groups of 2 or more images of batch={self.batch}")
        named = re.fullmatch(r"none|mse|barlow|\w+-[0-9a-f]{8}", str(self.stage_loss))
        _demand(self, "stage_loss", named, "none, mse, barlow, or a class in ARMS")
        weights = self.stage_weights
        four = isinstance(weights, (tuple, list)) and len(weights) == 4
        _demand(self, "stage_weights", four and all(map(_number, weights)), "four numbers from 0 up")
        _demand(self, "views", isinstance(self.views, Views), "a Views")
        _demand(self, "stage_options", isinstance(self.stage_options, dict), "a dictionary")
        if known := {"mse": MSE, "barlow": BARLOW}.get(self.stage_loss):
            for name, value in self.stage_options.items():
                _demand(self, name, name in known and _alike(value, known[name]), f"something like {known}")

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
RELEASED_SIDE = {"chest": 512, "histology": 255, "retina": 299}
RELEASED_POOL = {"chest": (16, 16, 4, 4), "histology": (1, 1, 1, 1), "retina": (16, 16, 4, 4)}
RELEASED_PROJECTOR = 2048
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
PRESETS = tuple(EVALUATIONS)


def preset(name: str, arm: str, data, seed: int | None = None, /, **changes) -> Recipe:
    """The recipe of an arm on a data set.

    Args:
        name: "smoke" (seconds), "lesson" (a minute or so on two cores), "paper" (the released recipe, for GPUs) or
            "paper-sound" (the same without the leaks that the released one leaves open, see `_sound`).
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
    if wrong := sorted(set(ARMS[arm]) - {f.name for f in dataclasses.fields(Recipe)}):
        raise ValueError(f"the arm {arm} sets {wrong[0]!r}, which is no field of a recipe; mend its entry in ARMS")
    about = {"arm": arm, "dataset": data.name, "fingerprint": data.fingerprint}
    about |= {"channels": data.channels, "side": data.side} | ({} if seed is None else {"seed": seed})
    fields = (SMALL[name] | {"views": _views(LESSON_VIEWS, data)} if name in SMALL else _released(data)) | ARMS[arm]
    if name == "paper-sound":
        fields |= _sound(data, fields["batch"])
    options = dict(fields.get("stage_options", {}))
    if name not in SMALL and fields.get("stage_loss") == "mse":
        options["pool"] = RELEASED_POOL.get(data.modality, RELEASED_POOL["chest"])
    if name not in SMALL and arm == "barlow":
        options["projector"] = RELEASED_PROJECTOR
    if isinstance(fields.get("stage_loss"), type):
        fields["stage_loss"] = loss_name(fields["stage_loss"])
    fixed = {*about, "stage_loss", "stage_options"}  # what makes the arm and its data what they are
    known = sorted({f.name for f in dataclasses.fields(Recipe)} - fixed) + sorted(options)
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"{unknown[0]!r} cannot be changed in a recipe of {arm}; what can: {', '.join(known)}")
    fields["stage_options"] = options | {option: changes.pop(option) for option in options if option in changes}
    untrained = {"steps": 0} if _untrained(arm) else {}  # whatever the steps of the other arms are changed to
    return Recipe(**fields | changes | about | untrained)


def loss_name(loss: type) -> str:
    """`NAME-HASH` of a class of one's own, with a hash of its file or cell: an edited loss is another run.

    Raises:
        ValueError: Python does not know the source of the class.
    """
    try:  # Python does not find a class that was defined in a notebook, but it does find its methods
        method = next(part for part in vars(loss).values() if inspect.isfunction(part))
        source, _ = inspect.findsource(method)
    except (OSError, StopIteration):
        raise ValueError(f"Python has no source of {loss.__name__}; define it in a cell or a file") from None
    return f"{loss.__name__}-{hashlib.sha256(''.join(source).encode()).hexdigest()[:8]}"


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


def _epochs(data, batch: int) -> int:
    return RELEASED_EPOCHS * max(1, len(data.pretraining_rows()) // batch)


def _views(table: dict[str, Views], data) -> Views:
    views = table.get(data.modality, table["chest"])
    return views if data.channels == 3 else dataclasses.replace(views, saturation=0.0, hue=0.0, gray=0.0)
