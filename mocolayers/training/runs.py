"""Folders of finished and interrupted runs: `runs/KEY/` with recipe, checkpoint, encoder and history."""

import contextlib
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from mocolayers.method.encoder import StagedResNet
from mocolayers.method.moco import MoCo
from mocolayers.recipe import Recipe
from mocolayers.runtime import RunError, atomic_write, held, writing

ENCODER = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # torchvision's names, without the classifier
FIRST_BLOCK = "layer1.0.conv1.weight"


class Run:
    """One pretraining on disk, in the folder `runs_dir/KEY` that the recipe's key names."""

    def __init__(self, recipe: Recipe, runs_dir: str | Path = "runs") -> None:
        self.recipe = recipe
        self.folder = Path(runs_dir) / recipe.key
        self.encoder_file = self.folder / "encoder.safetensors"
        self.checkpoint_file = self.folder / "checkpoint.pt"
        self.history_file = self.folder / "history.csv"
        self.recipe_file = self.folder / "recipe.json"

    @property
    def finished(self) -> bool:
        """True once the trained encoder has its final name."""
        return self.encoder_file.is_file()

    @property
    def weights_hash(self) -> str:
        """Twelve characters that change with every bit of the encoder's file."""
        self._demand_finished()
        about = self.encoder_file.stat()
        return _sha256(self.encoder_file, about.st_size, about.st_mtime_ns)

    def open(self) -> None:
        """Make the folder and write the recipe into it; a file that is there already is never replaced."""
        text = self.recipe.to_json() + "\n"
        if not self.recipe_file.exists():
            write_file(self.recipe_file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        elif self.recipe_file.read_bytes().decode(errors="replace").split() != text.split():
            raise unusable(self.recipe_file, "is damaged, or not the recipe that its folder is named after")

    @contextlib.contextmanager
    def alone(self):
        """Hold an opened run for the length of a `with`, so that no two processes write into it; waits for another."""
        with held(self.recipe_file, wait=False) as mine:
            if mine is False:
                print(f"{self.folder}: already training in another process; waiting for it", flush=True)
        with held(self.recipe_file) as mine:
            if mine is False:
                raise RunError(f"{self.folder}: removed meanwhile; try again")
            yield

    def load_encoder(self) -> StagedResNet:
        """The pretrained query encoder, in evaluation mode.

        Raises:
            RunError: the run is not finished, or its file is damaged or of another architecture.
        """
        self._demand_finished()
        encoder = unfilled(lambda: build_encoder(self.recipe))
        try:
            encoder.load_state_dict(load_file(self.encoder_file))
            whole = about_weights(self.encoder_file).get("sha256") in (None, _digest(encoder.state_dict()))
        except (SafetensorError, RuntimeError, ValueError):
            whole = False
        if not whole:
            raise unusable(self.encoder_file, "is damaged, or of another architecture")
        return encoder.eval()

    def _demand_finished(self) -> None:
        if not self.finished:
            raise RunError(f"{self.encoder_file} does not exist: run pretrain again to finish this run")

    def history(self) -> pd.DataFrame:
        """One row per logged step: the loss and its terms, and what `monitors` measures; none of an untrained arm."""
        if not self.recipe.steps:
            return pd.DataFrame()
        try:
            return pd.read_csv(self.history_file)
        except (ValueError, OSError):
            raise unusable(self.history_file, "is missing or damaged") from None

    def checkpoint(self) -> dict | None:
        """The state to resume from, if there is one; only tensors and plain values are read, never code."""
        if not self.checkpoint_file.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint_file) as file:
                damaged = file.testzip()
            state = None if damaged else torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
        except Exception:
            state = None
        if not isinstance(state, dict) or "recipe" not in state:
            raise unusable(self.checkpoint_file, "is damaged, or not a checkpoint of this program")
        if state["recipe"] != self.recipe.key:
            raise unusable(self.checkpoint_file, f"belongs to another recipe ({state['recipe']})")
        if state.get("step") not in range(self.recipe.steps + 1):
            raise unusable(self.checkpoint_file, f"is at step {state.get('step')!r} of {self.recipe.steps}")
        return state

    def save_history(self, rows: list[dict]) -> None:
        """Write one row per logged step."""
        write_file(self.history_file, lambda path: pd.DataFrame(rows).to_csv(path, index=False))


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def unusable(path: Path, why: str) -> RunError:
    """The error for a file of a run that is damaged or foreign, with its remedy."""
    return RunError(f"{path} {why}. Nothing was changed; to make it again, remove it: rm {path}")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`atomic_write` that makes the folder, and has a remedy for a full disk and a folder that cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            atomic_write(path, write)
        except (RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
                raise
            raise OSError("is the disk full?") from None


def build_encoder(recipe: Recipe) -> StagedResNet:
    """The encoder that a recipe asks for, with weights from torch's current random state."""
    return StagedResNet(recipe.layout, recipe.width, recipe.stem, recipe.channels, recipe.zero_init_residual)


def unfilled(build: Callable[[], Module]) -> Module:
    """A module whose weights are yet to be read; no random number is used up for them."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")


def save_weights(model: Module, path: Path, recipe: Recipe | None = None) -> None:
    """Write a model's state as safetensors; an encoder's says with the recipe which images it wants."""
    about = {}
    if recipe:
        names = ("layout", "width", "stem", "channels", "side", "arm", "dataset", "seed", "key")
        about |= {name: getattr(recipe, name) for name in names}
        about["input"] = "pixels from 0 to 1, without mean and standard deviation"
    _save(path, model.state_dict(), about)


def _save(path: Path, tensors: dict[str, Tensor], about: dict, said: str | None = None) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about | {"sha256": _digest(state, said)}
    # One entry: safetensors writes several in a random order, and equal weights would be unequal files.
    write_file(path, lambda temporary: save_file(state, temporary, {"about": json.dumps(about, sort_keys=True)}))


def save_kept(path: Path, tensors: dict[str, Tensor], said: str = "") -> None:
    """Write tensors that can be made again, and a text about them, with a checksum of both."""
    _save(path, tensors, {"said": said}, said)


def read_kept(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors of `save_kept`; nothing of a file that is missing or, with a line, that is damaged."""
    if not path.is_file():
        return "", {}
    with contextlib.suppress(SafetensorError, LookupError, TypeError, ValueError):
        about, tensors = about_weights(path), load_file(path)
        if about["sha256"] == _digest(tensors, about["said"]):
            return about["said"], tensors
    print(f"{path} is damaged, or of an older version: it is made again", flush=True)
    return "", {}


def about_weights(path: Path) -> dict:
    """What a file that `save_weights` wrote says of itself."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def _digest(state: dict[str, Tensor], said: str | None = None) -> str:
    """sha256 of the tensors; with a text also of that and of their names, types and shapes."""
    digest = hashlib.sha256()
    if said is not None:
        about = [[name, str(state[name].dtype), list(state[name].shape)] for name in sorted(state)]
        digest.update(json.dumps([said, about]).encode())
    for name in sorted(state):
        digest.update(state[name].numpy())
    return digest.hexdigest()


def transform(recipe: Recipe):
    """What turns a square PIL image of 8 bits into the (C, side, side) in [0, 1] that the recipe's encoder wants."""
    from torchvision.transforms import v2

    def plain(image):
        if image.width != image.height or image.mode[0] in "IF":
            raise ValueError(f"{image}: make it square and of eight bits, as the images of the training were made")
        return image.convert("RGB" if recipe.channels == 3 else "L")

    return v2.Compose([plain, v2.ToImage(), v2.Resize([recipe.side] * 2), v2.ToDtype(torch.float32, scale=True)])


def initial_weights(path: Path) -> tuple[dict[str, Tensor], str, str]:
    """Weights to start an encoder from.

    Args:
        path: .pth (no code in it is run) or .safetensors: a state dict of torchvision or timm, or a checkpoint of MoCo,
            Lightning or this program, in which an encoder's names have a prefix such as `module.encoder_q.`.
    Returns:
        The weights under torchvision's names, a fingerprint of the file, and a line that says what is used of it.
    Raises:
        RunError: the file is missing, or holds no ResNet.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        for name in ("state_dict", "model"):
            state = state[name] if isinstance(state.get(name), dict) else state
        starts = [name.removesuffix(FIRST_BLOCK) for name in state if name.endswith(FIRST_BLOCK)]
        start = min((s for s in starts if f"{s}conv1.weight" in state), key=lambda s: ("encoder_k" in s, len(s)))
        inside = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        weights = {name: value for name, value in inside.items() if name.startswith(ENCODER)}
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except Exception:  # whatever a foreign file brings up
        wanted = "the state dict of a ResNet under torchvision's names, as .pth or .safetensors"
        raise RunError(f"{path} cannot be used; --init wants {wanted}") from None
    where = f" under {start}" if start else ""
    said = f"{path}: {len(weights)} tensors{where} are used, {len(state) - len(weights)} are not; "
    return weights, fingerprint, said + "images stay in 0 to 1, and batch-norm learns their mean and spread anew"


def start_from(model: MoCo, path: str | Path | None, fingerprint: str) -> str:
    """Fill both encoders with `initial_weights`; a first layer for colours is summed over them for gray images.

    Returns:
        What was used, in one line.
    Raises:
        RunError: the weights are of another architecture, or not those of the recipe.
    """
    if path is None:
        raise RunError(f"this recipe starts from weights with fingerprint {fingerprint}; give their file: --init PATH")
    weights, found, said = initial_weights(Path(path))
    if found != fingerprint:
        raise RunError(f"{path} has fingerprint {found}, the recipe starts from {fingerprint}; give that file")
    if model.encoder_q.conv1.in_channels == 1:
        weights["conv1.weight"] = weights["conv1.weight"].sum(dim=1, keepdim=True)  # (C, 1, h, w)
    try:
        model.encoder_q.load_state_dict(weights)
        model.encoder_k.load_state_dict(weights)
    except RuntimeError as error:
        about = str(error).splitlines()[1].strip()
        raise RunError(
            f"{path} does not fit the recipe's encoder ({about}); for ImageNet weights of a ResNet-50 use --preset "
            "paper, or --set layout=resnet18 width=64 stem=imagenet for those of a ResNet-18"
        ) from None
    return said
