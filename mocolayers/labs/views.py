"""The view lab: every augmentation on a slider, on three modalities at once."""

import numpy as np
import torch

from mocolayers.data.views import random_view, to_float
from mocolayers.labs.panel import Answer, Lab, slider, tick, whole_slider
from mocolayers.notebook.figures import new_figure
from mocolayers.recipe import Views

COUNT = 6  # views beside each image
GAP = 6  # white pixels between pictures


def compute(images: dict[str, np.ndarray], views: Views, draw: int) -> dict[str, np.ndarray]:
    """Random views of one image per modality.

    Args:
        images: name and (H, W, C) uint8.
        views: the augmentations; colour changes are left out for images of one channel.
        draw: which random numbers.
    Returns:
        For each name `COUNT` views, (COUNT, H, W, C) uint8.
    """
    sheets = {}
    for number, (name, image) in enumerate(images.items()):
        x = to_float(torch.tensor(image)[None]).repeat(COUNT, 1, 1, 1)
        generator = torch.Generator().manual_seed(1000 * number + draw)
        sheets[name] = (random_view(x, views, generator).permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
    return sheets


def likeness(image: np.ndarray, sheet: np.ndarray) -> float:
    """Mean correlation between the gray values of an image (H, W, C) and of its views (n, H, W, C)."""
    flat = np.concatenate([image[None], sheet]).mean(axis=3).reshape(1 + len(sheet), -1)
    spread = flat.std(axis=1)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-9)[:, None]
    return float((flat[1:] @ flat[0]).mean() / flat.shape[1])


def draw_sheets(images: dict[str, np.ndarray], sheets: dict[str, np.ndarray]):
    """One line per modality: the image, then its views."""
    side = next(iter(images.values())).shape[0]
    lines = [_line([image, *sheets[name]], side) for name, image in images.items()]
    mosaic = np.concatenate(lines)
    figure, axes = new_figure(size=(9, 9 * mosaic.shape[0] / mosaic.shape[1] + 0.35), layout="tight")
    axes[0, 0].imshow(mosaic, interpolation="nearest")
    axes[0, 0].set_yticks((np.arange(len(images)) + 0.5) * (side + GAP), list(images))
    axes[0, 0].set_xticks([side / 2, (side + GAP) * 4 + GAP], ["image", "views"])
    axes[0, 0].tick_params(length=0)
    axes[0, 0].xaxis.tick_top()
    axes[0, 0].grid(False)
    axes[0, 0].spines[:].set_visible(False)
    return figure


def _line(pictures: list[np.ndarray], side: int) -> np.ndarray:
    white = np.full((side, GAP, 3), 255, np.uint8)
    cells = []
    for number, picture in enumerate(pictures):
        cells += [np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture, white]
        cells += [white] * (3 if number == 0 else 0)
    line = np.concatenate(cells, axis=1)
    return np.concatenate([line, np.full((GAP, line.shape[1], 3), 255, np.uint8)])


def view_lab(images: dict[str, np.ndarray]) -> Lab:
    """Sliders for every augmentation.

    Args:
        images: name and (H, W, C) uint8, all of one side.
    """

    def answer(left_right: bool, upside_down: bool, blur: float, draw: int, **strengths) -> Answer:
        sigma = (blur, blur + 1e-3)
        mirrors = {"hflip": 0.5 * left_right, "vflip": 0.5 * upside_down}
        views = Views(jitter=1, blur=float(blur > 0), sigma=sigma, **mirrors, **strengths)
        sheets = compute(images, views, draw)
        alike = {
            f"{name}: mean correlation with its views": f"{likeness(images[name], s):.2f}" for name, s in sheets.items()
        }
        return Answer(
            draw_sheets(images, sheets), f"{', '.join(images)}: one image and {COUNT} random views each.", alike
        )

    controls = {
        "crop": slider("crop keeps at least", 0.5, 0.05, 1, 0.05),
        "rotation": slider("rotation (±°)", 15, 0, 180, 5, ".0f"),
        "left_right": tick("mirror left and right"),
        "upside_down": tick("mirror top and bottom"),
        "brightness": slider("brightness (±)", 0, 0, 0.9, 0.1),
        "contrast": slider("contrast (±)", 0, 0, 0.9, 0.1),
        "saturation": slider("saturation (±)", 0, 0, 0.9, 0.1),
        "hue": slider("hue (± turn)", 0, 0, 0.5, 0.05),
        "gray": slider("drop colour (prob.)", 0, 0, 1, 0.1),
        "blur": slider("blur (sigma, px)", 0, 0, 8, 0.5, ".1f"),
        "draw": whole_slider("another draw", 0, 0, 20),
    }
    return Lab(controls, answer, "Would you still see the finding?")
