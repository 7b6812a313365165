"""One image file to eight bits: ordinary images are left as they are, deeper ones are scaled from a known range."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FEW = 32  # grey levels of 256
PERCENTILES = (1, 99)
OTHER_BYTE = {"B": "L", "L": "B", "N": "B"}  # Pillow reads the high byte of 16-bit colour; this order gives the low one
LOST = "warning: images with under 32 grey levels left; try --window percentile or --range LOW HIGH"


class Deep(NamedTuple):
    """An image of more than eight bits.

    Attributes:
        values: (H, W) or (H, W, 3) float64, dark to bright.
        kind: what the file is, for the note.
        info: Pillow's, with the orientation.
    """

    values: np.ndarray
    kind: str
    info: dict


def read(path: Path, deep_only: bool = False) -> Image.Image | Deep | None:
    """The image of a file at its own depth; with `deep_only` None, quickly, for one of eight bits."""
    with Image.open(path) as image:
        raw = _raw_mode(image)
        if raw.startswith(("RGB;16", "RGBA;16")):
            return Deep(_deep_colour(path, image), raw[:-1], image.info)
        if raw.startswith("LA;16"):
            raise ValueError("16-bit gray with transparency cannot be read; save it without transparency")
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            tags = getattr(image, "tag_v2", {})
            if tags.get(262) == 0:  # a TIFF whose 0 is white
                values = 2.0 ** tags[258][0] - 1 - values
            return Deep(values, image.mode, image.info)
        if not deep_only:
            image.load()
            return image
    return None


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are stored in the file, e.g. "RGB;16B"."""
    arguments = image.tile[0].args if getattr(image, "tile", None) else ""
    return str(arguments if isinstance(arguments, str) or not arguments else arguments[0])


def _deep_colour(path: Path, image: Image.Image) -> np.ndarray:
    """The high bytes and, read a second time in the other byte order, the low ones."""
    raw = _raw_mode(image)
    with Image.open(path) as low:
        other = raw[:-1] + OTHER_BYTE[raw[-1]]
        change = {raw: other}.get
        low.tile = [
            tile._replace(args=other if tile.args == raw else tuple(change(word, word) for word in tile.args))
            for tile in low.tile
        ]
        values = 256.0 * np.asarray(image) + np.asarray(low)
    return values[..., :3] * (np.asarray(image)[..., 3:] / 255 if image.mode == "RGBA" else 1)


def extremes(path: Path) -> tuple[float, float] | None:
    """The lowest and the highest value of a deep image; None for others and for what cannot be read."""
    with suppress(Exception):  # the error is told when the image is converted
        if deep := read(path, deep_only=True):
            values = deep.values[np.isfinite(deep.values)]
            return float(values.min()), float(values.max())
    return None


def eight_bits(path: Path, intensity: list | str) -> tuple[Image.Image, list[str]]:
    """An image of eight bits and notes on how it was made.

    Args:
        path: its file.
        intensity: the values that become black and white, or "percentile" for those of each image.
    """
    image = read(path)
    if not isinstance(image, Deep):
        return image, []
    finite = image.values[np.isfinite(image.values)]
    low, high = np.percentile(finite, PERCENTILES) if intensity == "percentile" else intensity
    values = np.nan_to_num(image.values, nan=low)
    pixels = (255 * ((values - low) / (high - low or 1)).clip(0, 1)).round().astype(np.uint8)
    said = "its percentiles" if intensity == "percentile" else f"{low:g}..{high:g}"
    notes = [f"{image.kind} images scaled to 8 bits from {said}"]
    if len(left := np.unique(pixels)) < FEW and len(np.unique(finite)) > len(left):
        notes.append(LOST)
    scaled = Image.fromarray(pixels)
    scaled.info = image.info
    return scaled, notes
