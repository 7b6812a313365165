"""Claims about random views."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as theirs

from mocolayers.data import views as module
from mocolayers.data.views import (
    Feeder,
    blur,
    gaussian_kernel,
    random_numbers,
    random_view,
    to_float,
    two_views,
    views_of_numbers,
)
from mocolayers.recipe import LESSON_VIEWS, RELEASED_VIEWS, Views

OFF = Views(brightness=0, contrast=0, saturation=0, hue=0, jitter=0, gray=0, blur=0)
RELEASED_ORDER = dataclasses.replace(RELEASED_VIEWS["retina"], released_order=True)
EVERY_KIND = [*LESSON_VIEWS.values(), *RELEASED_VIEWS.values(), RELEASED_ORDER]


def only(**changes):
    return dataclasses.replace(OFF, **changes)


def images(n=6, side=20, channels=3):
    return torch.randint(0, 256, (n, side, side, channels), generator=torch.Generator().manual_seed(0)).byte()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(n, side):
    """Images whose two channels say where a pixel is: column and row, in pixels."""
    line = torch.arange(side).float()
    return torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(n, 2, side, side)


@pytest.mark.parametrize("views", EVERY_KIND)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_and_range(views, channels):
    x_q, x_k = two_views(images(channels=channels), views, generator())
    for x in (x_q, x_k):
        assert x.shape == (6, channels, 20, 20)
        assert x.min() >= 0 and x.max() <= 1 + 1e-6
    assert not torch.allclose(x_q, x_k)


@pytest.mark.parametrize("views", EVERY_KIND)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("processes", [2, 3, 12])
def test_a_view_is_the_same_to_the_bit_however_many_processes_share_the_batch(views, channels, processes):
    batch, each = images(12, channels=channels), 12 // processes
    whole = two_views(batch, views, generator())
    parts = [slice(each * rank, each * (rank + 1)) for rank in range(processes)]
    numbers = random_numbers(generator(), 2, 12)  # as a training step draws them, for both views at once
    shared = [views_of_numbers(to_float(batch[part]), views, numbers[:, part]) for part in parts]
    for view, pieces in zip(whole, zip(*shared, strict=True), strict=True):
        assert torch.equal(view, torch.cat(pieces))


@pytest.mark.parametrize("views", EVERY_KIND)
def test_views_made_a_few_images_at_a_time_are_the_same(views, monkeypatch):
    pictures = images()
    whole = two_views(pictures, views, generator())
    monkeypatch.setattr(module, "CACHED", 4 * pictures[0].numel())
    parts = two_views(pictures, views, generator())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_same_generator_gives_the_same_views_and_leaves_the_images_alone():
    pictures, views = to_float(images()), RELEASED_ORDER
    before = pictures.clone()
    first, second, other = (random_view(pictures, views, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(pictures, before)


def test_switching_the_blur_off_changes_no_crop_and_no_colour():
    sharp = only(crop=0.4, jitter=1, brightness=0.4)
    blurred = dataclasses.replace(sharp, blur=1.0, sigma=(1e-3, 2e-3))  # too narrow to reach the next pixel
    x = to_float(images())
    assert torch.equal(random_view(x, sharp, generator()), random_view(x, blurred, generator()))


@pytest.mark.parametrize("side", [20, 28, 33])
@pytest.mark.parametrize("released_order", [False, True])
def test_an_image_that_is_not_moved_is_itself_to_the_bit(side, released_order):
    x = to_float(images(40, side))
    never = only(jitter=1e-9, gray=1e-9, blur=1e-9, released_order=released_order)
    assert torch.equal(random_view(x, OFF, generator()), x)
    assert torch.equal(random_view(x, never, generator()), x)


@pytest.mark.parametrize("field, axis", [("hflip", 3), ("vflip", 2)])
def test_a_certain_mirror_mirrors(field, axis):
    x = to_float(images())
    assert torch.allclose(random_view(x, only(**{field: 1.0}), generator()), x.flip(axis), atol=1e-5)


def crops_of_ours(side, scale, n):
    """Width and height in pixels of random crops, read from views of pixel coordinates."""
    view = random_view(coordinates(n, side), only(crop=scale), generator())
    middle = view[:, :, side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1]
    width, height = (middle[:, 0, 0, 1] - middle[:, 0, 0, 0]), (middle[:, 1, 1, 0] - middle[:, 1, 0, 0])
    return (torch.stack([width, height], dim=1) * side).round().numpy()


def crops_of_torchvision(side, scale, n):
    torch.manual_seed(0)
    empty = torch.empty(1, side, side)
    crops = [RandomResizedCrop.get_params(empty, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    return np.array([[width, height] for _, _, height, width in crops], float)


@pytest.mark.parametrize("side, scale", [(28, 0.8), (64, 0.8), (64, 0.4), (28, 0.08)])
def test_crops_are_distributed_as_torchvisions(side, scale):
    moments = []
    for crops in (crops_of_ours(side, scale, 6000), crops_of_torchvision(side, scale, 6000)):
        area, ratio = crops.prod(axis=1) / side**2, np.log(crops[:, 0] / crops[:, 1])
        full = (crops == side).any(axis=1)
        moments.append([area.mean(), area.std(), ratio.mean(), ratio.std(), full.mean(), (area < scale - 0.02).mean()])
    assert moments[0] == pytest.approx(moments[1], abs=0.02)


def test_crops_are_placed_evenly_over_the_image():
    view = random_view(coordinates(4000, 64), only(crop=0.25, ratio=1.0001), generator())
    centre = view[:, :, 31:33, 31:33].mean(dim=(2, 3)) / 63
    assert centre.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert np.corrcoef(centre.T)[0, 1] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("views", [only(crop=0.4), only(crop=0.4, hflip=0.5, vflip=0.5)])
def test_a_crop_does_not_darken_the_border(views):
    assert random_view(torch.ones(200, 1, 28, 28), views, generator()).min() == pytest.approx(1, abs=1e-6)


def angles(views, n=2000, side=65):
    """Degrees by which random views turn a dot that is right of the centre, and its distance from it in pixels."""
    x = torch.zeros(n, 1, side, side)
    x[:, :, side // 2 - 1 : side // 2 + 2, side // 2 + 19 : side // 2 + 22] = 1
    weight = random_view(x, views, generator())
    place = (coordinates(n, side) - side // 2) * weight
    across, down = (place.sum(dim=(2, 3)) / weight.sum(dim=(2, 3))).T
    return torch.rad2deg(torch.atan2(down, across)), torch.hypot(across, down)


@pytest.mark.parametrize("released_order", [False, True])
def test_rotation_turns_by_an_even_choice_of_angles_about_the_centre(released_order):
    turned, distance = angles(only(rotation=30, released_order=released_order))
    assert turned.mean().item() == pytest.approx(0, abs=1.5)
    assert turned.std().item() == pytest.approx(30 / math.sqrt(3), abs=1)
    assert 28.5 < turned.abs().max() < 31
    assert distance.mean().item() == pytest.approx(20, abs=0.1)


def test_rotation_brings_black_in_and_darkens_nothing_inside_the_image():
    view = random_view(torch.ones(300, 1, 28, 28), only(rotation=30), generator())
    assert ((view == 0) | (view > 1 - 1e-6)).all()
    assert (view[:, :, 0, 0] == 0).float().mean() > 0.8, "most corners come from outside"
    assert view[:, :, 5:-5, 5:-5].min() > 1 - 1e-6


def test_released_order_recolours_before_the_geometry_and_rotates_to_the_nearest_pixel():
    x = to_float(images(50, 28, 1)).round()
    nearest, bilinear = (random_view(x, only(rotation=30, released_order=o), generator()) for o in (True, False))
    assert set(nearest.unique().tolist()) == {0.0, 1.0} and len(bilinear.unique()) > 100
    # A factor of contrast is relative to the mean gray: of the whole image in the released order, else of the view.
    half = torch.zeros(200, 1, 28, 28)
    half[..., 14:] = 0.5
    strong = only(crop=0.1, jitter=1, contrast=0.9, released_order=True)
    black = random_view(half, strong, generator()).amin(dim=(1, 2, 3))
    other = random_view(half, dataclasses.replace(strong, released_order=False), generator()).amin(dim=(1, 2, 3))
    assert not torch.allclose(black, other, atol=0.01)
    recoloured = random_view(half, only(jitter=1, contrast=0.9), generator())
    cropped = random_view(recoloured, only(crop=0.1), generator())
    assert torch.allclose(random_view(half, strong, generator()), cropped, atol=1e-5)


def factors(view, x):
    """The factor on each image's deviation from its mean, by least squares."""
    a, b = ((each - each.mean(dim=(1, 2, 3), keepdim=True)).flatten(1) for each in (x, view))
    return (a * b).sum(dim=1) / a.square().sum(dim=1)


@pytest.mark.parametrize("name, function", [("brightness", "adjust_brightness"), ("contrast", "adjust_contrast")])
@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_are_torchvisions(name, function, channels):
    x = 0.4 + 0.2 * to_float(images(60, channels=channels))  # far from 0 and 1, where both are cut
    view = random_view(x, only(jitter=1, **{name: 0.4}), generator())
    found = factors(view, x)
    assert found.min() > 0.6 - 1e-4 and found.max() < 1.4 + 1e-4 and found.std() > 0.2
    expected = [getattr(theirs, function)(image, factor.item()) for image, factor in zip(x, found, strict=True)]
    assert torch.allclose(view, torch.stack(expected), atol=1e-3 if name == "contrast" else 1e-4)


def test_saturation_is_torchvisions():
    x = 0.4 + 0.2 * to_float(images(60))
    view = random_view(x, only(jitter=1, saturation=0.4), generator())
    gray = theirs.rgb_to_grayscale(x)
    found = factors(view - gray, x - gray)
    assert found.min() > 0.6 - 1e-3 and found.max() < 1.4 + 1e-3 and found.std() > 0.2
    expected = [theirs.adjust_saturation(image, factor.item()) for image, factor in zip(x, found, strict=True)]
    assert torch.allclose(view, torch.stack(expected), atol=1e-3)


def test_hue_keeps_the_mean_of_the_channels_and_moves_colours_less_than_torchvisions():
    x = 0.3 + 0.4 * to_float(images(400))
    view = random_view(x, only(jitter=1, hue=0.1), generator())
    assert torch.allclose(view.mean(dim=1), x.mean(dim=1), atol=1e-5)
    turns = (torch.rand(400, generator=generator(1)) - 0.5) / 5
    expected = torch.stack([theirs.adjust_hue(image, turn.item()) for image, turn in zip(x, turns, strict=True)])
    assert 0.6 < ((view - x).square().mean() / (expected - x).square().mean()).item() < 0.75


def test_dropped_colour_is_torchvisions_and_as_frequent_as_asked():
    x = to_float(images(1000, 4))
    view = random_view(x, only(gray=0.2), generator())
    dropped = (view != x).flatten(1).any(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert torch.allclose(view[dropped], theirs.rgb_to_grayscale(x[dropped], 3), atol=1e-3)


def test_blur_equals_scipys_away_from_the_border():
    x = to_float(images(2, 32, 1))
    ours = blur(x, gaussian_kernel(torch.full((2,), 1.3), 1.3))[:, 0, 8:-8, 8:-8]
    expected = [gaussian_filter(image[0].numpy(), 1.3)[8:-8, 8:-8] for image in x]
    assert torch.allclose(ours, torch.tensor(np.stack(expected)), atol=0.01)


def test_reading_ahead_changes_no_batch_and_ends_in_time():
    asked = []
    feed = Feeder(lambda step: asked.append(step) or [torch.tensor([step])], torch.device("cpu"), 11)
    assert [int(*feed(step)) for step in (3, 4, 5, 9, 10)] == [3, 4, 5, 9, 10]
    feed.reader.shutdown()
    assert max(asked) == 10


@pytest.mark.parametrize("name", RELEASED_VIEWS)
def test_a_compiled_view_is_one_graph_and_the_same_view(name):
    """It blurs every image, if only by a kernel of one pixel, because a graph cannot ask which ones."""
    pictures, numbers = to_float(images(n=12, channels=3)), random_numbers(generator(), 2, 12)
    for views in (RELEASED_VIEWS[name], LESSON_VIEWS[name]):
        compiled = torch.compile(views_of_numbers, fullgraph=True, dynamic=False, backend="eager")
        wanted = views_of_numbers(pictures, views, numbers)
        found = compiled(pictures, views, numbers)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
