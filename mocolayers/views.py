"""`TwoViews`: two random views of a whole batch of images at once, on the batch's device."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocolayers.datasets import MedicalImages
from mocolayers.distributed import own_part, world_size
from mocolayers.recipe import Views

# Luma weights of ITU-R BT.601, as PIL and torchvision use them to drop colour.
LUMA = (0.299, 0.587, 0.114)


class TwoViews:
    """Make two independent random views of every image of a batch.

    All randomness comes from the generator passed in, so a step can be repeated exactly. Crop, rotation and mirror are
    one bilinear resampling; what falls outside the image is black.

    Args:
        views: which augmentations, and how strong.
    """

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views of a batch.

        Args:
            images: (B, H, W, C) uint8.
            generator: a CPU generator.
        Returns:
            x_q and x_k, (B, C, H, W) float32 in [0, 1] each.
        """
        x = to_float(images)
        both = random_view(torch.cat([x, x]), self.views, generator, copies=2)  # (2B, C, H, W)
        x_q, x_k = both.chunk(2)
        return x_q, x_k


def to_float(images: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div(255)


def batches(data: MedicalImages, rows: np.ndarray, device: torch.device, size: int = 250) -> Iterator[Tensor]:
    """The images of some rows as they are, (B, C, H, W) in [0, 1] on the device, at most `size` at a time."""
    for group in np.array_split(rows, max(1, -(-len(rows) // size))):
        yield to_float(torch.from_numpy(data.images[group]).to(device))


def random_view(x: Tensor, views: Views, generator: torch.Generator, copies: int = 1) -> Tensor:
    """One random view of each image of a batch.

    Args:
        x: (B, C, H, W) in [0, 1].
        views: which augmentations, and how strong.
        generator: a CPU generator.
        copies: how many times the batch's images stand in x, one pass after the other.
    """
    draws = Draws(generator, len(x), copies)
    x = _resample(x, _geometry(views, draws).to(x.device))
    x = _jitter(x, views, draws)
    if views.gray and x.shape[1] == 3:
        x = x.lerp(luma(x), _happens(x, views.gray, draws))
    if views.blur:
        happens = _happens(x, views.blur, draws)
        x = x.lerp(gaussian_blur(x, _uniform(x, *views.sigma, draws)), happens)
    return x


class Draws:
    """Random numbers, one per image.

    In distributed training they are drawn for the whole batch and a process keeps those of its part, so that the views
    of an image do not depend on how many processes there are.
    """

    def __init__(self, generator: torch.Generator, count: int, copies: int) -> None:
        self.generator, self.copies = generator, copies
        self.whole = count // copies * world_size()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(count,) numbers between two."""
        drawn = torch.rand(self.copies * self.whole, generator=self.generator) * (high - low) + low
        return drawn.view(self.copies, self.whole)[:, own_part(self.whole)].flatten()


def luma(x: Tensor) -> Tensor:
    """(B, 1, H, W) gray value of (B, 3, H, W) colour, or of (B, 1, H, W) itself."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of a batch (B, C, H, W) with its own standard deviation in pixels, (B, 1, 1, 1)."""
    b, c, h, w = x.shape
    radius = max(1, min(math.ceil(2.5 * float(sigma.max())), (min(h, w) - 1) // 2))
    offset = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.view(b, 1).clamp_min(1e-3)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 2r + 1)
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    return _correlate(_correlate(padded, kernel, dim=2), kernel, dim=3)


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


def _jitter(x: Tensor, views: Views, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order; the same probability for the four together."""
    if not views.jitter:
        return x
    brightness = _uniform(x, 1 - views.brightness, 1 + views.brightness, draws)
    contrast = _uniform(x, 1 - views.contrast, 1 + views.contrast, draws)
    mean = luma(x.mean(dim=(2, 3), keepdim=True))
    y = torch.addcmul(brightness * (1 - contrast) * mean, brightness * contrast, x)
    if x.shape[1] == 3 and (views.saturation or views.hue):
        saturation = _uniform(x, 1 - views.saturation, 1 + views.saturation, draws)
        y = _change_colours(y, saturation, _uniform(x, -views.hue, views.hue, draws))
    return x.lerp(y.clamp_(0, 1), _happens(x, views.jitter, draws))


def _change_colours(x: Tensor, saturation: Tensor, turn: Tensor) -> Tensor:
    """Saturation and hue of each image (B, 3, H, W), by (B, 1, 1, 1).

    Both are linear in the colour, so it is enough to change the three primary colours and to mix them for each pixel.
    """
    primary = torch.eye(3, device=x.device).view(1, 3, 3, 1)  # an image of three pixels
    gray = luma(primary)
    changed = _turn_hue(gray + (primary - gray) * saturation, turn)  # (B, 3, 3, 1)
    return (changed.squeeze(3) @ x.flatten(2)).view_as(x)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn colours about the gray axis by a share of the full circle, (B, 1, 1, 1), keeping r + g + b.

    A rotation of the RGB cube, three multiplications a pixel, where torchvision goes through HSV.
    """
    angle = 2 * math.pi * turn
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    mean = x.mean(dim=1, keepdim=True)
    return mean + cos * (x - mean) + sin * (x.roll(1, dims=1) - x.roll(-1, dims=1))


def _uniform(x: Tensor, low: float, high: float, draws: Draws) -> Tensor:
    return draws.uniform(low, high).view(-1, 1, 1, 1).to(x.device)


def _happens(x: Tensor, probability: float, draws: Draws) -> Tensor:
    """(B, 1, 1, 1) ones and zeros, for `lerp`: it is exact at both, and several times as fast as `where`."""
    return (draws.uniform() < probability).view(-1, 1, 1, 1).to(x)
