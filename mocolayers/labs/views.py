"""The view lab: every augmentation on a slider, on three modalities at once."""

import numpy as np
import torch
from ipywidgets import Checkbox, FloatSlider, IntSlider

from mocolayers.data.views import random_view, to_float
from mocolayers.labs.panel import Answer, Lab
from mocolayers.notebook.figures import image_sheet
from mocolayers.recipe import Views

COUNT = 6  # views beside each image


def compute(images: dict[str, np.ndarray], views: Views, draw: int) -> dict[str, np.ndarray]:
    """`COUNT` random views (COUNT, H, W, C) uint8 of each image (H, W, C); `draw` chooses the random numbers."""
    sheets = {}
    for number, (name, image) in enumerate(images.items()):
        x = to_float(torch.tensor(image)[None]).repeat(COUNT, 1, 1, 1)
        generator = torch.Generator().manual_seed(1000 * number + draw)
        sheets[name] = (random_view(x, views, generator).permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
    return sheets


def likeness(image: np.ndarray, sheet: np.ndarray) -> float:
    """Mean correlation between the gray values of an image (H, W, C) and of its views (n, H, W, C)."""
    flat = np.concatenate([image[None], sheet]).mean(axis=3).reshape(1 + len(sheet), -1)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / np.maximum(flat.std(axis=1, keepdims=True), 1e-9)
    return float((flat[1:] @ flat[0]).mean() / flat.shape[1])


def view_lab(images: dict[str, np.ndarray]) -> Lab:
    """Sliders for every augmentation of some images: name and (H, W, C) uint8."""

    def answer(left_right: bool, upside_down: bool, blur: float, draw: int, **strengths) -> Answer:
        mirrors = {"hflip": 0.5 * left_right, "vflip": 0.5 * upside_down}
        views = Views(jitter=1, blur=float(blur > 0), sigma=(blur, blur + 1e-3), **mirrors, **strengths)
        sheets = compute(images, views, draw)
        figure = image_sheet({name: [images[name], *sheet] for name, sheet in sheets.items()}, heads=("image", "views"))
        alike = {f"{name}: mean correlation with its views": likeness(images[name], s) for name, s in sheets.items()}
        numbers = {name: f"{value:.2f}" for name, value in alike.items()}
        return figure, f"{', '.join(images)}: one image and {COUNT} random views each.", numbers

    controls = {
        "crop": FloatSlider(0.5, min=0.05, max=1, step=0.05, description="crop keeps at least"),
        "rotation": FloatSlider(15, min=0, max=180, step=5, readout_format=".0f", description="rotation (±°)"),
        "left_right": Checkbox(False, indent=False, description="mirror left and right"),
        "upside_down": Checkbox(False, indent=False, description="mirror top and bottom"),
        "brightness": FloatSlider(0, min=0, max=0.9, description="brightness (±)"),
        "contrast": FloatSlider(0, min=0, max=0.9, description="contrast (±)"),
        "saturation": FloatSlider(0, min=0, max=0.9, description="saturation (±)"),
        "hue": FloatSlider(0, min=0, max=0.5, step=0.05, description="hue (± turn)"),
        "gray": FloatSlider(0, min=0, max=1, description="drop colour (prob.)"),
        "blur": FloatSlider(0, min=0, max=8, step=0.5, readout_format=".1f", description="blur (sigma, px)"),
        "draw": IntSlider(0, min=0, max=20, description="another draw"),
    }
    return Lab(controls, answer, "Would you still see the finding?")
