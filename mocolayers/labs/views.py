"""The view lab: every augmentation on a slider, on findings whose place is known, beside a detector's verdict."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from ipywidgets import Checkbox, FloatSlider, IntSlider
from scipy import ndimage
from scipy.stats import mannwhitneyu
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from mocolayers.data.views import random_view, to_float
from mocolayers.labs.panel import Answer, Lab
from mocolayers.notebook.figures import image_sheet
from mocolayers.recipe import Views

COUNT = 4  # views beside each image
SCALES = (1, 2, 4, 8)  # pixels
JUDGED = 5  # the detector looks at one pixel in so many
MARK = (0, 230, 255)


class Finding(NamedTuple):
    """An image with a finding that can be pointed at.

    Attributes:
        image: (H, W, C) uint8.
        mark: (H, W), True where the finding is.
        detector: tells pixels of a finding from others by their `surroundings`; it was not fitted on this image.
    """

    image: np.ndarray
    mark: np.ndarray
    detector: HistGradientBoostingClassifier


def learn_finding(pairs: list[tuple[np.ndarray, np.ndarray]], smooth: float = 1) -> Finding:
    """The last of some images with its mark, and a detector fitted on the others.

    Args:
        pairs: images (H, W, C) uint8, each with its finding and without it, all else being the same.
        smooth: see `mark_of`.
    """
    marks = np.stack([mark_of(*pair, smooth) for pair in pairs])
    images = np.stack([image for image, _ in pairs])
    detector = HistGradientBoostingClassifier(max_iter=40, random_state=0)
    detector.fit(_judged(surroundings(images[:-1])), _judged(marks[:-1]))
    return Finding(images[-1], marks[-1], detector)


def mark_of(image: np.ndarray, without: np.ndarray, smooth: float) -> np.ndarray:
    """(H, W), True where an image differs from itself without the finding, smoothed over some pixels."""
    change = ndimage.gaussian_filter(np.abs(image.astype(float) - without).max(axis=2), smooth)
    return change > 0.3 * change.max()


def surroundings(images: np.ndarray) -> np.ndarray:
    """(n, H, W, F): how each pixel of (n, H, W, C) images differs from the mean around it, at several scales.

    Brightness and contrast of a whole image cancel out.
    """
    x = images.astype(np.float32)
    smooth = [x, *(ndimage.gaussian_filter(x, (0, s, s, 0), truncate=3) for s in SCALES)]
    fine = [a - b for a, b in zip(smooth[:-1], smooth[1:], strict=True)]
    busy = [ndimage.gaussian_filter(np.abs(part), (0, 3, 3, 0), truncate=3) for part in fine[:2]]
    features = np.concatenate([*fine, *busy], axis=3)
    return features / (features.std(axis=(1, 2), keepdims=True) + 1e-3)


def _judged(maps: np.ndarray) -> np.ndarray:
    """One pixel in `JUDGED` of (n, H, W, ...): (pixels, ...)."""
    return maps.reshape(-1, *maps.shape[3:])[::JUDGED]


def compute(findings: dict[str, Finding], views: Views, draw: int) -> dict[str, dict[str, np.ndarray]]:
    """`COUNT` random views of each image; `draw` chooses the random numbers.

    Returns:
        By name: `views` (COUNT, H, W, C) uint8; `marks` (COUNT, H, W), moved with them; `scores`, see `score`.
    """
    geometry = replace(views, jitter=0, gray=0, blur=0)
    found = {}
    for number, (name, (image, mark, detector)) in enumerate(findings.items()):
        seed = 1000 * number + draw  # the same for image and mark, which are moved alike
        sheet = (_views(to_float(torch.tensor(image)[None]), views, seed) * 255).to(torch.uint8).numpy()
        both = torch.from_numpy(np.stack([mark, np.ones_like(mark)])[None]).float()
        marks, inside = np.moveaxis(_views(both, geometry, seed).numpy() > 0.5, 3, 0)
        found[name] = {"views": sheet, "marks": marks, "scores": score(detector, sheet, marks, inside)}
    return found


def _views(x: Tensor, views: Views, seed: int) -> Tensor:
    """(COUNT, H, W, C) views of one image (1, C, H, W)."""
    sheet = random_view(x.repeat(COUNT, 1, 1, 1), views, torch.Generator().manual_seed(seed))
    return sheet.permute(0, 2, 3, 1)


def score(detector: HistGradientBoostingClassifier, sheet: np.ndarray, marks: np.ndarray, inside: np.ndarray) -> list:
    """For each view, how often the detector ranks a pixel of the finding above another pixel of the image.

    Guessing scores 0.5. A view that has lost the finding, or shows nothing else, has no score and is left out.
    """
    pixels = sheet[0, ..., 0].size
    says = np.full(len(sheet) * pixels, np.nan)
    says[::JUDGED] = detector.predict_proba(_judged(surroundings(sheet)))[:, 1]
    found = []
    for view, mark, valid in zip(says.reshape(marks.shape), marks, inside, strict=True):
        valid = valid & np.isfinite(view)
        inner, outer = view[valid & mark], view[valid & ~mark]
        if inner.size and outer.size:
            found.append(float(mannwhitneyu(inner, outer, method="asymptotic").statistic / inner.size / outer.size))
    return found


def outlined(image: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """(H, W, 3): an image with a line around its finding."""
    wide, near = (ndimage.binary_dilation(mark, iterations=n) for n in (2, 1))
    picture = np.broadcast_to(image, (*mark.shape, 3)).copy()
    picture[wide & ~near] = MARK
    return picture


def verdict(scores: list, own: float) -> str:
    """What the detector scores on the views of a finding, and on the image itself."""
    lost = COUNT - len(scores)
    parts = [f"{np.mean(scores):.2f} on the views"] if scores else []
    parts += [f"the finding is lost in {lost} of {COUNT} views"] if lost else []
    return ", ".join([*parts, f"{own:.2f} on the image"])


def view_lab(findings: dict[str, Finding]) -> Lab:
    """Sliders for every augmentation of some findings, by name."""
    own = {
        n: score(f.detector, f.image[None], f.mark[None], np.ones_like(f.mark)[None])[0] for n, f in findings.items()
    }

    def answer(left_right: bool, upside_down: bool, blur: float, draw: int, marked: bool, **strengths) -> Answer:
        mirrors = {"hflip": 0.5 * left_right, "vflip": 0.5 * upside_down}
        views = Views(jitter=1, blur=float(blur > 0), sigma=(blur, blur + 1e-3), **mirrors, **strengths)
        seen, rows = compute(findings, views, draw), {}
        for name, (image, mark, _) in findings.items():
            pictures, marks = [image, *seen[name]["views"]], [mark, *seen[name]["marks"]]
            rows[name] = [outlined(*pair) for pair in zip(pictures, marks, strict=True)] if marked else pictures
        numbers = {f"{name}: detector's score": verdict(seen[name]["scores"], own[name]) for name in findings}
        alt = f"{', '.join(findings)}: one image with a finding and {COUNT} random views of each."
        return image_sheet(rows, heads=("image", "views"), inches=1.25), alt, numbers

    controls = {
        "marked": Checkbox(False, indent=False, description="mark the finding"),
        "crop": FloatSlider(0.5, min=0.05, max=1, step=0.05, description="crop keeps at least"),
        "rotation": FloatSlider(15, min=0, max=180, step=5, readout_format=".0f", description="rotation (±°)"),
        "blur": FloatSlider(0, min=0, max=8, step=0.5, readout_format=".1f", description="blur (sigma, px)"),
        "contrast": FloatSlider(0, min=0, max=0.9, description="contrast (±)"),
        "hue": FloatSlider(0, min=0, max=0.5, step=0.05, description="hue (± turn)"),
        "draw": IntSlider(0, min=0, max=20, description="other random views"),
        "brightness": FloatSlider(0, min=0, max=0.9, description="brightness (±)"),
        "saturation": FloatSlider(0, min=0, max=0.9, description="saturation (±)"),
        "gray": FloatSlider(0, min=0, max=1, description="drop colour (prob.)"),
        "left_right": Checkbox(False, indent=False, description="mirror left and right"),
        "upside_down": Checkbox(False, indent=False, description="mirror top and bottom"),
    }
    return Lab(controls, answer, "Would you still see the finding?")
