"""Random views of a whole batch of images at once, on the batch's device."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocolayers.data.prepared import MedicalImages
from mocolayers.recipe import Views

# Luma weights of ITU-R BT.601, as PIL and torchvision use them to drop colour.
LUMA = (0.299, 0.587, 0.114)
TRIES = 10  # of a crop, before the whole image is taken
# Random numbers of a view of an image; all are drawn, so that switching one augmentation off leaves the others alone.
SAMPLE = {"area": TRIES, "aspect": TRIES, "place": 2, "angle": 1, "mirror": 2, "jitter": 5, "gray": 1, "blur": 2}
MOST_IMAGES, MOST_PIXELS = 250, 2**22  # four maps of 2**22 pixels take about half a gigabyte
MOST_ON_GPU = 4096  # images at a time on anything but a processor: few small ones leave it idle
CACHED = 2**19  # numbers, two megabytes: a dozen passes over more than that wait for memory, several times as long


def to_float(images: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2) / 255


class Feeder:
    """The tensors that `read` gives for a step, on the device; those of the next step are read in a thread meanwhile.

    Args:
        read: from a step's number to tensors on the processor.
        steps: how many there are, if no more may be asked for.
    """

    def __init__(self, read: Callable[[int], Sequence[Tensor]], device: torch.device, steps: float = math.inf) -> None:
        self.read, self.device, self.steps = read, device, steps
        self.reader, self.next = ThreadPoolExecutor(1), (-1, None)

    def __call__(self, step: int) -> list[Tensor]:
        number, waiting = self.next
        tensors = waiting.result() if number == step else self._pinned(step)
        if step + 1 < self.steps:
            self.next = (step + 1, self.reader.submit(self._pinned, step + 1))
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def _pinned(self, step: int) -> Sequence[Tensor]:
        """A GPU copies from pinned memory while it computes, and nobody waits."""
        tensors = self.read(step)
        return [tensor.pin_memory() for tensor in tensors] if self.device.type == "cuda" else tensors


def batch_size(side: int, device: torch.device) -> int:
    """How many images of a side are encoded at a time where no gradient is needed."""
    return max(1, min(MOST_IMAGES if device.type == "cpu" else MOST_ON_GPU, MOST_PIXELS // side**2))


def batches(data: MedicalImages, rows: np.ndarray, device: torch.device, size: int | None = None) -> Iterator[Tensor]:
    """Images of some rows, (B, C, H, W) in [0, 1] on the device, at most `size` or else `batch_size` at a time."""
    size = size or batch_size(data.side, device)
    groups = np.array_split(rows, max(1, -(-len(rows) // size)))
    feed = Feeder(lambda number: [torch.from_numpy(data.images[groups[number]])], device, len(groups))
    for number in range(len(groups)):
        yield to_float(*feed(number))


def random_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """(*shape, 33) numbers in [0, 1), which decide a view each; from a CPU generator."""
    return torch.rand(*shape, sum(SAMPLE.values()), generator=generator)


def two_views(images: Tensor, views: Views, generator: torch.Generator) -> list[Tensor]:
    """Two random views (B, C, H, W) in [0, 1] of each image (B, H, W, C) of uint8; the CPU generator decides all."""
    return views_of_numbers(to_float(images), views, random_numbers(generator, 2, len(images)).to(images.device))


def random_view(x: Tensor, views: Views, generator: torch.Generator) -> Tensor:
    """One random view of each image (B, C, H, W) in [0, 1]; the CPU generator decides everything."""
    return views_of_numbers(x, views, random_numbers(generator, 1, len(x)).to(x.device))[0]


def views_of_numbers(x: Tensor, views: Views, numbers: Tensor) -> list[Tensor]:
    """V views of each image (B, C, H, W), decided by `random_numbers` (V, B, 33), whatever the other images are.

    Crop, rotation and mirror are one bilinear resampling; what a rotation brings in from outside the image is black.
    """
    # All views in one go: at 28 px, a call for each view spends half of its time between the many small steps.
    choices = choose(views, x.shape[1:], numbers.flatten(0, 1))
    rows = torch.arange(len(x), device=x.device).repeat(len(numbers))
    if not _on_processor(x):
        return list(transform(x[rows], views, choices).chunk(len(numbers)))
    count = max(1, CACHED // x[0].numel())  # a few images at a time, as many as the cache holds
    out = x.new_empty(len(rows), *x.shape[1:])
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        out[some] = transform(x[rows[some]], views, {name: values[some] for name, values in choices.items()})
    return list(out.chunk(len(numbers)))


def _on_processor(x: Tensor) -> bool:
    """Whether code may depend on what a tensor holds: elsewhere it waits for a device, and breaks a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def choose(views: Views, shape: tuple[int, int, int], sample: Tensor) -> dict[str, Tensor]:
    """What `transform` does to each image, from its random numbers (B, 33) in [0, 1); nothing for what is off.

    Args:
        shape: channels, height and width of the images.
    """
    u = dict(zip(SAMPLE, sample.split(list(SAMPLE.values()), dim=1), strict=True))
    chosen = {"matrix": _geometry(views, *shape[1:], u)}
    if views.jitter:
        chosen |= _jitter(views, shape[0], u["jitter"].T)
    if views.gray and shape[0] == 3:
        chosen["gray"] = (u["gray"] < views.gray).float()
    if views.blur:
        happens, sigma = u["blur"].T
        sigma = views.sigma[0] + (views.sigma[1] - views.sigma[0]) * sigma
        chosen["kernel"] = gaussian_kernel(torch.where(happens < views.blur, sigma, 0.0), views.sigma[1])
    return chosen


def transform(x: Tensor, views: Views, chosen: dict[str, Tensor]) -> Tensor:
    """Change images (B, C, H, W) as chosen for each."""
    if views.released_order:
        return _resample(_recolour(x, chosen), views, chosen["matrix"], "nearest" if views.rotation else "bilinear")
    return _recolour(_resample(x, views, chosen["matrix"], "bilinear"), chosen)


def _geometry(views: Views, height: int, width: int, u: dict[str, Tensor]) -> Tensor:
    """(B, 2, 3) affine maps from the view's coordinates to the image's, both in [-1, 1]."""
    w, h = _crop_sides(views, height, width, u["area"], u["aspect"])
    left, top = (u["place"].T * torch.stack([width - w + 1, height - h + 1])).floor()
    centre_x, centre_y = (2 * left + w) / width - 1, (2 * top + h) / height - 1
    angle = views.rotation * (2 * u["angle"].squeeze(1) - 1) * math.pi / 180
    flip_x, flip_y = (1 - 2 * (u["mirror"][:, n] < flip).float() for n, flip in enumerate((views.hflip, views.vflip)))
    across, down = w / width * flip_x, h / height * flip_y
    x = torch.stack([angle.cos() * across, -angle.sin() * down, centre_x], dim=1)
    y = torch.stack([angle.sin() * across, angle.cos() * down, centre_y], dim=1)
    return torch.stack([x, y], dim=1)


def _crop_sides(views: Views, height: int, width: int, area: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height in pixels, (B,) each, of torchvision's RandomResizedCrop of square images.

    The first of ten tries that fits into the image is taken, or the whole image if none fits.
    """
    area = height * width * (views.crop + (1 - views.crop) * area)  # (B, TRIES)
    aspect = (math.log(views.ratio) * (2 * aspect - 1)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0) & (views.crop < 1)
    first = F.pad(fits, (0, 1), value=True).int().argmax(dim=1, keepdim=True)
    w, h = F.pad(w, (0, 1), value=width), F.pad(h, (0, 1), value=height)
    return w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)


def _resample(x: Tensor, views: Views, matrix: Tensor, mode: str) -> Tensor:
    h, w = x.shape[2:]
    column, row = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in (w, h))
    across = matrix[:, :, :1] * column  # (B, 2, W)
    down = matrix[:, :, 1:2] * row + matrix[:, :, 2:]  # (B, 2, H)
    grid = down.unsqueeze(3) + across.unsqueeze(2)  # (B, 2, H, W); torch's affine_grid takes ten times as long
    y = F.grid_sample(x, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="border", align_corners=False)
    if views.rotation:  # grid_sample's own zeros would darken the border inside the image
        return y.mul_(torch.maximum(*grid.abs_().split(1, dim=1)).le_(1))
    unmoved = (matrix == torch.eye(2, 3, device=x.device)).flatten(1).all(dim=1)
    if _on_processor(x) and not unmoved.any():
        return y
    return torch.where(unmoved.view(-1, 1, 1, 1), x, y, out=y)  # without rounding, and in the layout of y


def _jitter(views: Views, channels: int, u: Tensor) -> dict[str, Tensor]:
    """Brightness, contrast, saturation and hue, in this order, as one change of colour (see `_recolour`), from (5, B).

    The hue turns about the gray axis of the RGB cube and keeps r + g + b. torchvision goes through HSV; at its 0.1 the
    colours of noise change there with 1.5 times the variance, those of stained tissue with 1.7, of a fundus with 1.3.
    """
    u = torch.where(u[4] < views.jitter, 2 * u - 1, 0.0).view(5, -1, 1, 1)  # all four, or a change that changes nothing
    brightness, contrast = 1 + views.brightness * u[0], 1 + views.contrast * u[1]
    saturation, angle = 1 + views.saturation * u[2], 2 * math.pi * (views.hue * u[3])
    gain = brightness * contrast
    if channels == 3:
        one = torch.eye(3, device=u.device)
        third = one.roll(1, dims=0)  # a third of the circle
        turn = angle.cos() * one + (1 - angle.cos()) / 3 + angle.sin() / math.sqrt(3) * (third - third.T)
        gain = gain * (turn @ (saturation * one + torch.cat([(1 - saturation) * weight for weight in LUMA], dim=2)))
    return {"gain": gain, "lift": brightness * (1 - contrast)}


def _recolour(x: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """Colour change, dropped colour and blur. A colour becomes gain (C, C) times it, plus lift times the mean gray."""
    b, c, h, w = x.shape
    if "gain" in chosen:
        lift = chosen["lift"].unsqueeze(3) * luma(x.mean(dim=(2, 3), keepdim=True))
        x = (chosen["gain"] @ x.reshape(b, c, h * w)).view(b, c, h, w).add_(lift).clamp_(0, 1)
    if "gray" in chosen:
        x = x.lerp(luma(x), chosen["gray"].view(-1, 1, 1, 1))
    if "kernel" not in chosen:
        return x
    if not _on_processor(x):
        return blur(x, chosen["kernel"])  # that of an image that stays sharp is 1 in the middle, else 0
    blurred = (chosen["kernel"].amax(dim=1) < 1).nonzero().squeeze(1)
    return x.index_copy(0, blurred, blur(x[blurred], chosen["kernel"][blurred])) if len(blurred) else x


def luma(x: Tensor) -> Tensor:
    """(B, 1, H, W) gray value of (B, 3, H, W) colour, or of (B, 1, H, W) itself."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def gaussian_kernel(sigma: Tensor, largest: float) -> Tensor:
    """(B, K) weights for standard deviations in pixels (B,), cut at 2.5 times the largest; 0 is no blur at all."""
    radius = max(1, math.ceil(2.5 * largest))
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.unsqueeze(1).clamp_min(1e-3)) ** 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each image of a batch (B, C, H, W) with its own kernel (B, K) along both axes, mirrored at the edge."""
    radius, most = kernel.shape[1] // 2, min(x.shape[2:]) - 1
    if radius > most:  # a mirror image has no more pixels than that
        kernel = kernel[:, radius - most : radius + most + 1]
        radius, kernel = most, kernel / kernel.sum(dim=1, keepdim=True)
    x, weights = F.pad(x, (radius,) * 4, mode="reflect"), kernel.T.reshape(-1, len(x), 1, 1, 1)  # (K, B, 1, 1, 1)
    for dim in (2, 3):
        length = x.shape[dim] - len(weights) + 1
        y = weights[0] * x.narrow(dim, 0, length)
        for place, weight in enumerate(weights[1:], start=1):
            y.addcmul_(weight, x.narrow(dim, place, length))
        x = y
    return x
