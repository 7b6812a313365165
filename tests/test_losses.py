"""The losses against independent formulas, and what is known of their blind spots."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mocolayers.method import losses
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import (
    STAGE_LOSSES,
    StageBarlow,
    StageMSE,
    barlow_terms,
    barlow_terms_of_few,
    correlations,
    cross_correlation,
    info_nce,
    pool_stage,
    stage_distance,
)

CHANNELS = [8, 16, 32, 64]
SHAPES = [(6, 8, 4, 4), (6, 16, 4, 4), (6, 32, 1, 1), (6, 64, 1, 1)]  # as `MoCo` hands them over


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stages(seed):
    return [normal(*shape, seed=seed + i).relu() for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("length", [0, 1, 37])
def test_info_nce_equals_a_softmax_built_by_hand(length):
    q, k = (F.normalize(normal(5, 8, seed=s), dim=1) for s in (0, 1))
    queue = F.normalize(normal(length, 8, seed=2), dim=1)
    loss, logits = info_nce(q, k, queue, 0.2)
    q, k, queue = (x.numpy().astype(np.float64) for x in (q, k, queue))
    by_hand = []
    for row in range(5):
        positive = np.exp(q[row] @ k[row] / 0.2)
        by_hand.append(-np.log(positive / (positive + np.exp(queue @ q[row] / 0.2).sum())))
    assert loss.item() == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert logits.shape == (5, 1 + length)


@pytest.mark.parametrize("side", [1, 2, 4, 7, 10])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_and_its_gradient_equal_torchs_whether_the_side_divides_or_not(side, layout):
    maps = [normal(3, 5, 14, 10).to(memory_format=layout).requires_grad_() for _ in range(2)]
    pooled = [pool(x, side) for pool, x in zip((pool_stage, F.adaptive_avg_pool2d), maps, strict=True)]
    assert torch.allclose(*pooled, atol=1e-6)
    for x in pooled:
        (x * normal(*x.shape, seed=1)).sum().backward()
    assert torch.allclose(maps[0].grad, maps[1].grad, atol=1e-6)


def test_pooling_to_more_than_the_map_has_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="14 x 10 cannot be pooled to 11 x 11"):
        pool_stage(normal(3, 5, 14, 10), 11)


def test_pooled_bf16_maps_are_fp32():
    maps = normal(3, 5, 14, 14).bfloat16()
    assert all(pool_stage(maps, side).dtype == torch.float32 for side in (1, 4))


def test_stage_mse_is_the_mean_square_of_each_stage():
    u, v = stages(0), stages(10)
    for a, b, term in zip(u, v, StageMSE(CHANNELS, (4, 4, 1, 1))(u, v), strict=True):
        assert term.item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-5)


def test_info_nce_gives_a_key_one_similarity_as_positive_and_as_negative_under_autocast():
    q, k = (F.normalize(normal(16, 128, seed=s), dim=1) for s in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = info_nce(q, k, k, 0.1)
    assert torch.allclose(logits[:, 0], logits[:, 1:].diagonal(), atol=1e-5)


def test_correlations_are_fp32_under_autocast():
    z_u, z_v = normal(64, 8), normal(64, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_correlation(z_u, z_v)
    assert np.allclose(found, np.corrcoef(z_u.T, z_v.T)[:8, 8:], atol=1e-4)


def test_scale_free_distance_is_two_minus_two_cosines():
    u, v = normal(7, 12), normal(7, 12, seed=1)
    cosine = F.cosine_similarity(u, v, dim=1)
    assert stage_distance(u, v, scale_free=True).item() == pytest.approx((2 - 2 * cosine).mean().item(), abs=1e-6)


def test_standardized_distance_is_two_minus_two_correlations_and_blind_to_gain_offset_and_constant_features():
    u, v = normal(9, 6), normal(9, 6, seed=1)
    correlation = np.mean([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(6)])
    expected = stage_distance(u, v, standardized=True).item()
    assert expected == pytest.approx(2 - 2 * correlation, abs=1e-3)
    assert stage_distance(3 * u + 5, v - 2, standardized=True).item() == pytest.approx(expected, abs=1e-3)
    same = torch.ones(9, 6)
    assert stage_distance(same, same, scale_free=True).item() == pytest.approx(0, abs=1e-6)
    mixed_u, mixed_v = torch.cat([u, same], dim=1), torch.cat([v, same], dim=1)
    assert stage_distance(mixed_u, mixed_v, standardized=True).item() == pytest.approx(expected / 2, abs=1e-3)


def perceptron(loss: StageBarlow, stage: int) -> nn.Sequential:
    """The projector of a stage from torch's own parts; the first layer is shared."""
    layers, width = [loss.first[stage]], loss.deeper[0].shape[1]
    for norm, weight in zip(loss.norms, loss.deeper, strict=True):
        one, linear = nn.BatchNorm1d(width), nn.Linear(width, width, bias=False)
        one.weight.data, one.bias.data = (p.data.view(-1, width)[stage] for p in (norm.weight, norm.bias))
        linear.weight.data = weight.data[stage]
        layers += [one, nn.ReLU(), linear]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.0051])
def test_stage_barlow_equals_a_computation_from_scratch(off_diagonal):
    scale = 1 / 32
    loss = StageBarlow(CHANNELS, 10, off_diagonal, scale)
    for norm in (module for module in loss.modules() if isinstance(module, nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    u, v = ([s.mean(dim=(2, 3), keepdim=True) for s in stages(seed)] for seed in (0, 10))
    for stage, (a, b, term) in enumerate(zip(u, v, loss(u, v), strict=True)):
        project = perceptron(loss, stage)
        z_u, z_v = (project(x.flatten(1)).detach().double().numpy() for x in (a, b))
        z_u, z_v = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in (z_u, z_v))
        total = 0.0
        for i in range(10):
            for j in range(10):
                c = np.mean(z_u[:, i] * z_v[:, j])
                total += (c - 1) ** 2 if i == j else off_diagonal * c**2
        assert term.item() == pytest.approx(scale * total, rel=1e-4)


def test_the_projector_learns_from_both_views():
    loss = StageBarlow([8], projector=4)
    u, v = ([normal(6, 8, 1, 1, seed=seed)] for seed in (0, 1))
    project = perceptron(loss, 0)
    (term,) = loss(u, v)
    term.backward()
    found = loss.first[0].weight.grad.clone()
    gradients = []
    for target in (lambda z: z, lambda z: z.detach()):
        project.zero_grad()
        on, off = barlow_terms(cross_correlation(project(u[0].flatten(1)), target(project(v[0].flatten(1)))))
        ((on + off) / 32).backward()
        gradients.append(project[0].weight.grad.clone())
    assert torch.allclose(found, gradients[0], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found, gradients[1], rtol=1e-3, atol=1e-6)


def test_a_projector_gives_a_view_what_it_gives_it_beside_another():
    loss, u, v, w = StageBarlow([8], projector=4), *([normal(6, 8, 1, 1, seed=seed)] for seed in range(3))
    both, other, turned = (loss.project(*views) for views in ((u, v), (u, w), (v, u)))
    assert torch.allclose(both[:, :, 0], other[:, :, 0], atol=1e-5)
    assert torch.allclose(both, turned.flip(2), atol=1e-5)


@pytest.mark.parametrize("name, options", [("mse", {"pool": (4, 4, 1, 1)}), ("barlow", {"projector": 10})])
def test_every_stage_of_the_query_gets_a_gradient(name, options):
    u, v = [s.requires_grad_() for s in stages(0)], stages(10)
    loss = STAGE_LOSSES[name](CHANNELS, **options)
    pooled = ([pool_stage(s, side) for s, side in zip(view, loss.pool, strict=True)] for view in (u, v))
    sum(loss(*pooled)).backward()
    assert all(s.grad.abs().sum() > 0 for s in u)


def scale_stages(encoder: StagedResNet, gain: float) -> None:
    """Multiply the output of every stage but the last by a gain; the batch-norm of the next layer takes it back."""
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3):
        block = layer[-1]
        affine = [block.bn2] + ([block.downsample[1]] if block.downsample is not None else [])
        for norm in affine:
            norm.weight.data *= gain
            norm.bias.data *= gain
        if block.downsample is None:
            # The first stage's shortcut is its input: the stem's output has to shrink as well.
            encoder.bn1.weight.data *= gain
            encoder.bn1.bias.data *= gain


def test_o1_the_mse_falls_a_hundredfold_by_shrinking_and_the_embedding_does_not_move():
    torch.manual_seed(0)
    encoder = StagedResNet("resnet10", 16, "small", in_channels=1).train()
    x_u, x_v = normal(16, 1, 32, 32), normal(16, 1, 32, 32, seed=1)
    with torch.no_grad():
        before_u, before_v = encoder(x_u), encoder(x_v)
        scale_stages(encoder, 0.1)
        after_u, after_v = encoder(x_u), encoder(x_v)
    for number in range(3):
        pairs = (before_u.stages[number], before_v.stages[number]), (after_u.stages[number], after_v.stages[number])
        raw = [stage_distance(u, v).item() for u, v in pairs]
        free = [stage_distance(u, v, scale_free=True).item() for u, v in pairs]
        assert raw[1] / raw[0] == pytest.approx(0.01, rel=0.01)
        assert free[1] == pytest.approx(free[0], rel=0.01)
    assert torch.allclose(before_u.embedding, after_u.embedding, atol=0.02 * before_u.embedding.abs().max().item())


@pytest.mark.parametrize("batch, width", [(8, 64), (16, 512), (32, 100)])
def test_o2_identical_views_still_pay_off_diagonal_when_the_batch_is_small(batch, width):
    z = normal(batch, width)
    on, off = barlow_terms(cross_correlation(z, z))
    bound = width**2 / (batch - 1) - width
    assert off.item() >= bound * 0.999
    assert on.item() < 1e-3


@pytest.mark.parametrize("batch, identical, unrelated", [(16, 0.436, 0.440), (32, 0.211, 0.214), (2048, 0.003, 0.006)])
def test_o2_the_released_barlow_term_can_hardly_tell_identical_from_unrelated_views(batch, identical, unrelated):
    width, factor = 2048, 5e-5 / 32
    z_u, z_v = normal(batch, width), normal(batch, width, seed=1)
    same, other = (factor * sum(barlow_terms(cross_correlation(z_u, z))).item() for z in (z_u, z_v))
    assert same == pytest.approx(identical, abs=2e-3)
    assert other == pytest.approx(unrelated, abs=2e-3)
    assert other - same == pytest.approx(unrelated - identical, abs=1e-3)


@pytest.mark.parametrize("batch, width", [(16, 64), (64, 16)])
def test_barlow_terms_without_the_matrix_are_those_of_the_matrix(batch, width):
    """Value and gradient, also where several stages are asked for together and views are nearly alike."""
    found = []
    for terms in (barlow_terms_of_few, lambda z: barlow_terms(correlations(z))):
        u = normal(3, width, batch).requires_grad_()
        v = (u.detach() + 0.1 * normal(3, width, batch, seed=1)).requires_grad_()
        on, off = terms(torch.stack([u, v], dim=2))
        (on.sum() + 0.5 * off.sum()).backward()
        found.append((on, off, u.grad, v.grad))
    for few, whole in zip(*found, strict=True):
        assert torch.allclose(few, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("batch, unused", [(16, "correlations"), (64, "barlow_terms_of_few")])
def test_barlow_makes_its_matrix_only_where_the_batch_is_large(batch, unused, monkeypatch):
    loss = StageBarlow([8], projector=64)
    u, v = ([normal(batch, 8, 1, 1, seed=seed)] for seed in (0, 1))
    on, off = barlow_terms(correlations(loss.project(u, v)))
    monkeypatch.setattr(losses, unused, None)
    assert torch.allclose(loss(u, v)[0], (on + off)[0] / 32, rtol=1e-4)


def test_o2_no_correlation_at_all_would_be_cheapest_at_small_batches():
    assert 5e-5 / 32 * sum(barlow_terms(torch.zeros(2048, 2048))).item() == pytest.approx(0.003, abs=6e-4)


def test_o2_a_narrow_projector_and_a_small_weight_bring_the_difference_back():
    def saved(width, weight):
        z_u, z_v = normal(128, width), normal(128, width, seed=1)
        costs = []
        for z in (z_u, z_v):
            on, off = barlow_terms(cross_correlation(z_u, z))
            costs.append((on + weight * off).item())
        return 1 - costs[0] / costs[1]

    assert saved(2048, 1.0) < 0.1
    assert saved(128, 0.0051) > 0.9


def test_perfectly_agreeing_and_decorrelated_features_cost_nothing():
    z = torch.linalg.qr(normal(64, 9) - normal(64, 9).mean(dim=0))[0]
    z = torch.linalg.qr(z - z.mean(dim=0))[0]
    assert sum(barlow_terms(cross_correlation(z, z, eps=1e-12))).item() < 1e-2
