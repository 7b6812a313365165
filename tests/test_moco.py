"""Claims about the queue, the key encoder and the shuffle."""

from collections import deque

import pytest
import torch

from mocolayers.method.moco import MoCo, build_encoder
from mocolayers.recipe import PRETRAINED_ARMS, preset


def make(make_data, arm="moco", **changes):
    recipe = preset("smoke", arm, make_data(), **{"queue": 10, "dim": 4} | changes)
    torch.manual_seed(recipe.seed)
    return MoCo(recipe)


def pair(batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 1, 16, 16, generator=generator).unbind()


@pytest.mark.parametrize("batch", [1, 3, 10, 13, 27])
def test_any_batch_goes_with_any_queue_and_wraps_around(make_data, batch):
    model, expected = make(make_data), deque(maxlen=10)
    for step in range(15):
        keys = torch.arange(batch).float()[:, None].expand(batch, 4) + 100 * step
        model.enqueue(keys)
        expected.extend(keys[:, 0].tolist())
        assert int(model.filled) == len(expected)
        assert sorted(model.queue[: int(model.filled), 0].tolist()) == sorted(expected)
    oldest_first = torch.roll(model.queue[:, 0], -int(model.pointer)).tolist()
    assert oldest_first == list(expected)


def test_the_queue_starts_empty_and_keys_are_not_among_their_own_negatives(make_data):
    model = make(make_data)
    generator = torch.Generator().manual_seed(0)
    first = model(*pair(), generator)
    assert first.logits.shape == (8, 1) and first.loss.item() == 0
    second = model(*pair(seed=1), generator)
    negatives = second.logits[:, 1:] * model.temperature
    assert torch.allclose(negatives, second.q @ first.k.T, atol=1e-5), "only the earlier batch's keys"
    assert torch.allclose(second.logits[:, 0] * model.temperature, (second.q * second.k).sum(dim=1), atol=1e-5)


@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_the_key_encoder_gets_no_gradient_and_the_query_encoder_does(make_data, arm):
    model = make(make_data, arm)
    generator = torch.Generator().manual_seed(0)
    for seed in range(2):
        output = model(*pair(seed=seed), generator)
    output.loss.backward()
    assert all(p.grad is None for p in [*model.encoder_k.parameters(), *model.head_k.parameters()])
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    assert torch.allclose(output.loss, sum(output.terms.values()))
    assert len(output.terms) == (1 if arm == "moco" else 5)


def test_the_momentum_update_is_exact_and_leaves_batch_norm_buffers_alone(make_data):
    model = make(make_data, momentum=0.9)
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.encoder_q.bn1.running_mean.fill_(5.0)
    before = {name: p.clone() for name, p in model.encoder_k.named_parameters()}
    buffers = {name: b.clone() for name, b in model.encoder_k.named_buffers()}
    model.momentum_update()
    query = dict(model.encoder_q.named_parameters())
    for name, parameter in model.encoder_k.named_parameters():
        assert torch.allclose(parameter, 0.9 * before[name] + 0.1 * query[name], atol=1e-6)
    assert all(torch.equal(b, buffers[name]) for name, b in model.encoder_k.named_buffers())


def test_the_key_encoders_buffers_follow_the_keys_it_saw(make_data):
    model = make(make_data, bn_splits=1)
    x_q, x_k = pair()
    model(x_q, 3 * x_k)
    assert not torch.allclose(model.encoder_k.bn1.running_mean, model.encoder_q.bn1.running_mean)


def test_shuffled_keys_and_their_stages_come_back_in_order(make_data):
    model = make(make_data, bn_splits=4).eval()
    _, x_k = pair(16)
    with torch.no_grad():
        straight = model.encoder_k(x_k)
        shuffled = model._encode_shuffled(x_k, torch.Generator().manual_seed(1))
    assert torch.allclose(straight.embedding, shuffled.embedding, atol=1e-5)
    for a, b in zip(straight.stages, shuffled.stages, strict=True):
        assert torch.allclose(a.mean(dim=(2, 3), keepdim=True), b, atol=1e-5)


def test_the_output_holds_stages_pooled_as_the_loss_pools_them(make_data):
    model, (x_q, x_k) = make(make_data, "mse", bn_splits=1, pool=(4, 3, 1, 1)), pair()
    output = model(x_q, x_k)
    assert [tuple(s.shape[2:]) for s in output.query_stages] == [(4, 4), (3, 3), (1, 1), (1, 1)]
    whole = model.encoder_q(x_q).stages, model.encoder_k(x_k).stages
    for number, term in enumerate(model.stage_loss(*whole), start=1):
        assert torch.allclose(term, output.terms[f"stage{number}"], rtol=1e-4)


def test_the_shuffle_really_regroups_the_keys(make_data):
    model = make(make_data, bn_splits=4).train()
    _, x_k = pair(16)
    with torch.no_grad():
        straight = model._encode(model.encoder_k, x_k)
        shuffled = model._encode_shuffled(x_k, torch.Generator().manual_seed(1))
    assert not torch.allclose(straight.embedding, shuffled.embedding, atol=1e-3)


def test_every_arm_starts_from_the_same_weights(make_data):
    states = [make(make_data, arm) for arm in ("moco", "mse", "barlow", "random")]
    for other in states[1:]:
        for name, value in states[0].state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_query_and_key_encoder_start_equal(make_data):
    model = make(make_data)
    for a, b in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("field, value", [("head", "cubic"), ("stage_loss", "huber"), ("stem", "tiny")])
def test_an_unknown_choice_lists_the_known_ones(make_data, field, value):
    with pytest.raises(ValueError, match="choose"):
        make(make_data, **{field: value})


def test_the_encoder_is_what_the_recipe_says(make_data):
    recipe = preset("paper", "moco", make_data())
    encoder = build_encoder(recipe)
    assert encoder.stage_channels == [256, 512, 1024, 2048]
