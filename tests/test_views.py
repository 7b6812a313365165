"""Claims about random views."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from mocolayers.data import views as module
from mocolayers.data.views import TwoViews, _turn_hue, blur, gaussian_kernel, random_view, to_float
from mocolayers.recipe import LESSON_VIEWS, RELEASED_VIEWS, Views

OFF = Views(jitter=0, gray=0, blur=0)


def images(n=6, side=20, channels=3):
    return torch.randint(0, 256, (n, side, side, channels), generator=torch.Generator().manual_seed(0)).byte()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("views", [*LESSON_VIEWS.values(), *RELEASED_VIEWS.values()])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_and_range(views, channels):
    x_q, x_k = TwoViews(views)(images(channels=channels), generator())
    for x in (x_q, x_k):
        assert x.shape == (6, channels, 20, 20)
        assert x.min() >= 0 and x.max() <= 1 + 1e-6
    assert not torch.allclose(x_q, x_k)


def test_without_augmentation_the_image_comes_back():
    x = to_float(images())
    assert torch.allclose(random_view(x, OFF, generator()), x, atol=1e-5)


def test_the_same_generator_gives_the_same_views():
    first, second, other = (TwoViews(LESSON_VIEWS["histology"])(images(), generator(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("field, axis", [("hflip", 3), ("vflip", 2)])
def test_a_certain_mirror_mirrors(field, axis):
    x = to_float(images())
    assert torch.allclose(
        random_view(x, dataclasses.replace(OFF, **{field: 1.0}), generator()), x.flip(axis), atol=1e-5
    )


def test_blur_equals_scipys_away_from_the_border():
    x = to_float(images(2, 32, 1))
    ours = blur(x, gaussian_kernel(torch.full((2,), 1.3), 1.3))[:, 0, 8:-8, 8:-8]
    theirs = [gaussian_filter(image[0].numpy(), 1.3)[8:-8, 8:-8] for image in x]
    assert torch.allclose(ours, torch.tensor(np.stack(theirs)), atol=0.01)


def test_turning_the_hue_keeps_the_mean_of_the_channels_and_a_full_circle_changes_nothing():
    x = to_float(images())
    turned = _turn_hue(x, torch.full((6, 1, 1, 1), 0.3))
    assert torch.allclose(turned.mean(dim=1), x.mean(dim=1), atol=1e-5)
    assert not torch.allclose(turned, x, atol=0.05)
    assert torch.allclose(_turn_hue(x, torch.ones(6, 1, 1, 1)), x, atol=1e-4)


def test_a_rotation_keeps_the_centre_and_moves_the_corner():
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    turned = random_view(x, dataclasses.replace(OFF, rotation=90), generator(3))
    assert turned[0, 0, 10, 10] == pytest.approx(1, abs=1e-4)


def test_a_crop_keeps_at_least_its_share_of_the_area():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).repeat(200, 1, 1, 1)
    view = random_view(ramp, dataclasses.replace(OFF, crop=0.25, ratio=1.0), generator())
    width = view[:, 0, 32, -1] - view[:, 0, 32, 0]
    assert width.min() > 0.45 and width.max() <= 1.01


@pytest.mark.parametrize("channels", [1, 3])
def test_views_made_a_few_images_at_a_time_are_the_same(channels, monkeypatch):
    pictures = images(channels=channels)
    whole = TwoViews(RELEASED_VIEWS["retina"])(pictures, generator())
    monkeypatch.setattr(module, "CACHED", 4 * pictures[0].numel())
    parts = TwoViews(RELEASED_VIEWS["retina"])(pictures, generator())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_an_image_that_no_chance_picks_is_left_alone():
    x = to_float(images(40))
    never = dataclasses.replace(OFF, jitter=1e-9, gray=1e-9, blur=1e-9)
    assert torch.allclose(random_view(x, never, generator()), x, atol=1e-5)
