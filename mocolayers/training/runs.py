"""Folders of finished and interrupted runs: `runs/KEY/` with recipe, checkpoint, encoder and history."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import Module

from mocolayers.method.encoder import StagedResNet
from mocolayers.method.moco import MoCo, build_encoder
from mocolayers.recipe import Recipe
from mocolayers.runtime import RunError, atomic_write


class Run:
    """One pretraining on disk.

    Args:
        recipe: what is or was trained; its key names the folder.
        runs_dir: the folder that holds all runs.
    """

    def __init__(self, recipe: Recipe, runs_dir: str | Path = "runs") -> None:
        self.recipe = recipe
        self.folder = Path(runs_dir) / recipe.key
        self.encoder_file = self.folder / "encoder.safetensors"
        self.checkpoint_file = self.folder / "checkpoint.pt"
        self.history_file = self.folder / "history.csv"

    @property
    def finished(self) -> bool:
        """True once the trained encoder stands under its final name."""
        return self.encoder_file.is_file()

    @property
    def weights_hash(self) -> str:
        """Stand-in: twelve characters that name the weights."""
        return hashlib.sha256(self.encoder_file.read_bytes()).hexdigest()[:12]

    def open(self) -> None:
        """Make the folder and write the recipe into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "recipe.json", lambda path: path.write_text(self.recipe.to_json() + "\n"))

    def load_encoder(self) -> StagedResNet:
        """The pretrained query encoder, in evaluation mode.

        Raises:
            RunError: the run is not finished, or its file is damaged or of another architecture.
        """
        encoder = unfilled(lambda: build_encoder(self.recipe))
        load_weights(encoder, self.encoder_file)
        return encoder.eval()

    def history(self) -> pd.DataFrame:
        """One row per logged step: the loss and its terms, and what `monitors` measures."""
        return pd.read_csv(self.history_file)


def unfilled(build: Callable[[], Module]) -> Module:
    """A module whose weights are yet to be read; to draw random ones first would take longer than to read them."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")


def load_weights(model: Module, path: Path) -> None:
    """Fill a model from a safetensors file, or say which file does not fit and what to do."""
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: this run is not finished; run pretrain again to resume it") from None
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be used ({first}). Delete it and run again: rm {path}") from None


def initial_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Weights to start an encoder from, under torchvision's names, and a fingerprint of the file.

    Args:
        path: a state dict of torchvision's or timm's ResNet (.pth, read without running code in it), or safetensors.
    Raises:
        RunError: the file is missing or is not a state dict.
    """
    try:
        read = partial(torch.load, map_location="cpu", weights_only=True)
        read = load_file if path.suffix == ".safetensors" else read
        state = {name.removeprefix("module."): tensor for name, tensor in read(path).items()}
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path} cannot be read ({first}); --init wants a state dict as .pth or .safetensors") from None
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, fingerprint


def start_from(model: MoCo, path: str | Path | None, fingerprint: str) -> None:
    """Fill both encoders with `initial_weights`; a first layer for colours is summed over them for gray images.

    Raises:
        RunError: the weights are of another architecture, or not those of the recipe.
    """
    if path is None:
        raise RunError(f"this recipe starts from weights with fingerprint {fingerprint}; give their file: --init PATH")
    weights, found = initial_weights(Path(path))
    if found != fingerprint:
        raise RunError(f"{path} has fingerprint {found}, the recipe starts from {fingerprint}; give that file")
    encoder = model.encoder_q
    first = weights.get("conv1.weight")  # (C, 3, h, w)
    if first is not None and first.shape[1] == 3 and encoder.conv1.in_channels == 1:
        weights["conv1.weight"] = first.sum(dim=1, keepdim=True)
    try:
        encoder.load_state_dict(weights)
        model.encoder_k.load_state_dict(weights)
    except RuntimeError as error:
        about = str(error).splitlines()[1].strip()
        raise RunError(
            f"{path} does not fit the recipe's encoder ({about}); for ImageNet weights of a ResNet-50 use --preset "
            "paper, or --set layout=resnet18 width=64 stem=imagenet for those of a ResNet-18"
        ) from None


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint; only tensors and plain values are accepted, never code.

    Raises:
        RunError: a truncated or foreign file; it is left as it is.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "model", "optimiser", "history"} <= set(state):
            raise ValueError("it is not a checkpoint of this program")
        return state
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path} cannot be read ({first}). To start this run again: rm {path}") from None


def save_weights(model: Module, path: Path) -> None:
    """Write a model's state as safetensors, atomically."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(path, lambda temporary: save_file(state, temporary))
