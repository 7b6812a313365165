"""`TwoViews`: two random views of a whole batch of images at once, on the batch's device."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.recipe import Views

# Luma weights of ITU-R BT.601, as PIL and torchvision use them to drop colour.
LUMA = (0.299, 0.587, 0.114)


CACHED = 2**19  # numbers, two megabytes: a dozen passes over more than that wait for memory, several times as long


class TwoViews:
    """Make two independent random views of every image of a batch.

    All randomness comes from the generator passed in, so a step can be repeated exactly. Crop, rotation and mirror are
    one bilinear resampling; what falls outside the image is black.

    Args:
        views: which augmentations, and how strong.
    """

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(
        self, images: Tensor, generator: torch.Generator, whole: int | None = None, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Two views of a batch.

        Args:
            images: (B, H, W, C) uint8.
            generator: a CPU generator.
        Returns:
            x_q and x_k, (B, C, H, W) float32 in [0, 1] each.
        """
        x, count = to_float(images), len(images)
        drawn = draw(self.views, x.shape[1], Draws(generator, whole or count, 2, part))
        return transform(x, _rows(drawn, 0, count)), transform(x, _rows(drawn, count, 2 * count))


def to_float(images: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div(255)


def batches(data: MedicalImages, rows: np.ndarray, device: torch.device, size: int = 250) -> Iterator[Tensor]:
    """The images of some rows as they are, (B, C, H, W) in [0, 1] on the device, at most `size` at a time."""
    for group in np.array_split(rows, max(1, -(-len(rows) // size))):
        yield to_float(torch.from_numpy(data.images[group]).to(device))


def random_view(
    x: Tensor, views: Views, generator: torch.Generator, whole: int | None = None, part: slice = slice(None)
) -> Tensor:
    """One random view of each image of a batch.

    Args:
        x: (B, C, H, W) in [0, 1].
        views: which augmentations, and how strong.
        generator: a CPU generator.
    """
    return transform(x, draw(views, x.shape[1], Draws(generator, whole or len(x), 1, part)))


class Draws:
    """Random numbers, one per image.

    In distributed training they are drawn for the whole batch and a process keeps those of its part, so that the views
    of an image do not depend on how many processes there are.
    """

    def __init__(self, generator: torch.Generator, whole: int, copies: int, part: slice) -> None:
        self.generator, self.copies, self.whole, self.part = generator, copies, whole, part

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(count,) numbers between two."""
        drawn = torch.rand(self.copies * self.whole, generator=self.generator) * (high - low) + low
        return drawn.view(self.copies, self.whole)[:, self.part].flatten()


def draw(views: Views, channels: int, draws: Draws) -> dict[str, Tensor]:
    """What `transform` does to each of B images: tensors with B rows; an augmentation that is off has none."""
    drawn = {"geometry": _geometry(views, draws)}
    if views.jitter:
        drawn |= _jitter(views, channels, draws)
    if views.gray and channels == 3:
        drawn["gray"] = (draws.uniform() < views.gray).float()
    if views.blur:
        happens, sigma = draws.uniform() < views.blur, draws.uniform(*views.sigma)
        drawn["kernel"] = gaussian_kernel(torch.where(happens, sigma, 0.0), views.sigma[1])
    return drawn


def transform(x: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Change images (B, C, H, W) as drawn for each; on a processor a few at a time, as many as its cache holds."""
    count = max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, len(x), count):
        end = min(start + count, len(x))
        out[start:end] = _transform(x[start:end], _rows(drawn, start, end))
    return out


def _transform(x: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    blurred = _is_blurred(drawn["kernel"]) if "kernel" in drawn else []
    drawn = {name: values.to(x.device) for name, values in drawn.items()}
    x = _resample(x, drawn["geometry"])
    if "gain" in drawn:
        x = _change_colours(x, drawn["gain"], drawn["lift"]).clamp_(0, 1)
    if "gray" in drawn:
        x.lerp_(luma(x), drawn["gray"].view(-1, 1, 1, 1))
    if len(blurred):
        x[blurred] = blur(x[blurred], drawn["kernel"][blurred])
    return x


def _rows(drawn: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: values[start:end] for name, values in drawn.items()}


def luma(x: Tensor) -> Tensor:
    """(B, 1, H, W) gray value of (B, 3, H, W) colour, or of (B, 1, H, W) itself."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def gaussian_kernel(sigma: Tensor, largest: float) -> Tensor:
    """(B, K) weights for standard deviations in pixels (B,), cut at 2.5 times the largest; 0 is no blur at all."""
    radius = max(1, math.ceil(2.5 * largest))
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offset / sigma.unsqueeze(1).clamp_min(1e-3)) ** 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each image of a batch (B, C, H, W) with its own kernel (B, K) along both axes, mirrored at the edge."""
    radius, most = kernel.shape[1] // 2, min(x.shape[2:]) - 1
    if radius > most:  # a mirror image has no more pixels than that
        kernel = kernel[:, radius - most : radius + most + 1]
        radius, kernel = most, kernel / kernel.sum(dim=1, keepdim=True)
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    return _correlate(_correlate(padded, kernel, dim=2), kernel, dim=3)


def _is_blurred(kernel: Tensor) -> Tensor:
    """Numbers of the rows of (B, K) whose kernel is not 1 in the middle."""
    return (kernel[:, kernel.shape[1] // 2] < 1).nonzero().squeeze(1)


def _correlate(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlate each image (B, C, H, W) with its own kernel (B, K) along H or W, which becomes shorter by K - 1."""
    weights = kernel.T.reshape(-1, len(x), 1, 1, 1)  # (K, B, 1, 1, 1)
    length = x.shape[dim] - len(weights) + 1
    y = weights[0] * x.narrow(dim, 0, length)
    for place, weight in enumerate(weights[1:], start=1):
        y.addcmul_(weight, x.narrow(dim, place, length))
    return y


def _geometry(views: Views, draws: Draws) -> Tensor:
    """(B, 2, 3) affine maps from the view's coordinates to the image's, both in [-1, 1]."""
    uniform, area = draws.uniform, draws.uniform(views.crop, 1.0)
    ratio = math.log(views.ratio)
    aspect = torch.exp(uniform(-ratio, ratio)) if views.crop < 1 else torch.ones_like(area)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    centre_x, centre_y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    angle = uniform(-views.rotation, views.rotation) * math.pi / 180
    flip_x = 1 - 2 * (uniform(0, 1) < views.hflip).float()
    flip_y = 1 - 2 * (uniform(0, 1) < views.vflip).float()
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * width * flip_x, -sin * height * flip_y, centre_x], dim=1)
    bottom = torch.stack([sin * width * flip_x, cos * height * flip_y, centre_y], dim=1)
    return torch.stack([top, bottom], dim=1)


def _resample(x: Tensor, geometry: Tensor) -> Tensor:
    h, w = x.shape[2:]
    column, row = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in (w, h))
    across = geometry[:, :, :1] * column  # (B, 2, W)
    down = geometry[:, :, 1:2] * row + geometry[:, :, 2:]  # (B, 2, H)
    grid = down.unsqueeze(3) + across.unsqueeze(2)  # (B, 2, H, W); torch's affine_grid takes ten times as long
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False)


def _jitter(views: Views, channels: int, draws: Draws) -> dict[str, Tensor]:
    """Brightness, contrast, saturation and hue, in this order, as one change of colour; see `_change_colours`.

    An image that is left alone, with the same probability for the four together, gets a change that changes nothing.
    """
    brightness = draws.uniform(1 - views.brightness, 1 + views.brightness)
    contrast = draws.uniform(1 - views.contrast, 1 + views.contrast)
    mixing = torch.eye(channels).expand(len(contrast), -1, -1)
    if channels == 3 and (views.saturation or views.hue):
        saturation = draws.uniform(1 - views.saturation, 1 + views.saturation)
        mixing = _mixing(saturation.view(-1, 1, 1, 1), draws.uniform(-views.hue, views.hue).view(-1, 1, 1, 1))
    happens = (draws.uniform() < views.jitter).view(-1, 1, 1)
    brightness, contrast = (torch.where(happens, each.view(-1, 1, 1), 1.0) for each in (brightness, contrast))
    gain = brightness * contrast * torch.where(happens, mixing, torch.eye(channels))
    return {"gain": gain, "lift": brightness * (1 - contrast)}


def _change_colours(x: Tensor, gain: Tensor, lift: Tensor) -> Tensor:
    """gain (B, C, C) times each colour of x (B, C, H, W), plus lift (B, 1, 1) times the image's mean gray."""
    b, c, h, w = x.shape
    lift = lift * luma(x.mean(dim=(2, 3), keepdim=True)).view(b, 1, 1)
    if c == 1:
        return torch.addcmul(lift.unsqueeze(3), gain.unsqueeze(3), x)
    return torch.baddbmm(lift.expand(b, c, 1), gain, x.flatten(2)).view_as(x)


def _mixing(saturation: Tensor, turn: Tensor) -> Tensor:
    """(B, 3, 3) matrices that change the saturation and the hue of a colour, by (B, 1, 1, 1).

    Both are linear and leave gray alone, so it is enough to change the three primary colours.
    """
    primary = torch.eye(3).view(1, 3, 3, 1)  # an image of three pixels
    gray = luma(primary)
    return _turn_hue(gray + (primary - gray) * saturation, turn).squeeze(3)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn colours about the gray axis by a share of the full circle, (B, 1, 1, 1), keeping r + g + b.

    A rotation of the RGB cube, three multiplications a pixel, where torchvision goes through HSV.
    """
    angle = 2 * math.pi * turn
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    mean = x.mean(dim=1, keepdim=True)
    return mean + cos * (x - mean) + sin * (x.roll(1, dims=1) - x.roll(-1, dims=1))
