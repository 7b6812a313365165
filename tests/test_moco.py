"""Claims about the queue, the key encoder, the shuffle and what a stage loss is given."""

import os
import subprocess
import sys
from collections import deque
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import StageBarlow, StageMSE
from mocolayers.method.moco import MoCo

HOME = Path(__file__).resolve().parents[1]
LOSSES = {
    "mse": partial(StageMSE, pool=(4, 4, 1, 1)),
    "mse-standardized": partial(StageMSE, pool=(4, 4, 1, 1), standardized=True),
    "barlow": partial(StageBarlow, projector=16),
}


def make(loss="none", stage_weights=(0.25, 0.5, 1, 2), **changes):
    torch.manual_seed(0)
    encoder = partial(StagedResNet, "resnet10", 8, "small", in_channels=1)
    return MoCo(
        encoder, LOSSES.get(loss, loss if loss != "none" else None), stage_weights, **{"dim": 4, "queue": 10} | changes
    )


def pair(batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 1, 16, 16, generator=generator).unbind()


def shuffle(batch=8, seed=0):
    return torch.randperm(batch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 3, 10, 13, 27])
def test_any_batch_goes_with_any_queue_and_wraps_around(batch):
    model, expected = make(), deque(maxlen=10)
    for step in range(15):
        keys = torch.arange(batch).float()[:, None].expand(batch, 4) + 100 * step
        model.enqueue(keys)
        expected.extend(keys[:, 0].tolist())
        assert int(model.filled) == len(expected)
        assert sorted(model.queue[: int(model.filled), 0].tolist()) == sorted(expected)
    oldest_first = torch.roll(model.queue[:, 0], -int(model.pointer)).tolist()
    assert oldest_first == list(expected)


def test_the_queue_starts_empty_and_keys_are_not_among_their_own_negatives():
    model = make()
    first = model(*pair(), shuffle())
    assert first.logits.shape == (8, 1) and first.loss.item() == 0
    model.enqueue(first.keys)
    second = model(*pair(seed=1), shuffle())
    negatives = second.logits[:, 1:] * model.temperature
    assert torch.allclose(negatives, second.q @ first.k.T, atol=1e-5), "only the earlier batch's keys"
    assert torch.allclose(second.logits[:, 0] * model.temperature, (second.q * second.k).sum(dim=1), atol=1e-5)


def test_a_known_length_of_the_queue_changes_nothing():
    model = make()
    model.enqueue(F.normalize(torch.rand(7, 4), dim=1))
    asked, told = (model(*pair(), shuffle(), filled=filled) for filled in (None, 7))
    assert torch.equal(asked.logits, told.logits) and told.logits.shape == (8, 8)


@pytest.mark.parametrize("loss", ["none", *LOSSES])
def test_the_key_encoder_gets_no_gradient_and_the_query_encoder_does(loss):
    model = make(loss)
    for seed in range(2):
        output = model(*pair(seed=seed), shuffle())
        output.loss.backward()
        model.enqueue(output.keys)
    assert all(p.grad is None for p in [*model.encoder_k.parameters(), *model.head_k.parameters()])
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    assert torch.allclose(output.loss, sum(output.terms.values()))
    assert len(output.terms) == (1 if loss == "none" else 5)


def test_the_momentum_update_is_exact_and_leaves_batch_norm_buffers_alone():
    model = make(momentum=0.9)
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


def test_the_key_encoders_buffers_follow_the_keys_it_saw():
    model = make(bn_splits=1)
    x_q, x_k = pair()
    model(x_q, 3 * x_k)
    assert not torch.allclose(model.encoder_k.bn1.running_mean, model.encoder_q.bn1.running_mean)


def test_shuffled_keys_and_their_stages_come_back_in_order():
    model = make("mse", momentum=1.0, bn_splits=4).eval()
    _, x_k = pair(16)
    with torch.no_grad():
        expected, output = model.encoder_k(x_k), model(x_k, x_k, shuffle(16))
    keys = F.normalize(model.head_k(expected.embedding), dim=1)
    assert torch.allclose(output.k, keys, atol=1e-5)
    for stage, pooled, side in zip(expected.stages, output.key_stages, (4, 4, 1, 1), strict=True):
        assert torch.allclose(pooled, F.adaptive_avg_pool2d(stage, side), atol=1e-5)


def test_the_shuffle_regroups_the_keys():
    model = make(momentum=1.0, bn_splits=4).train()
    x, _ = pair(16)
    with torch.no_grad():
        model.head_k.load_state_dict(model.head_q.state_dict())
        shuffled = model(x, x, shuffle(16))
        whole = make(momentum=1.0, bn_splits=1).train()(x, x)
    assert torch.allclose(whole.q, whole.k, atol=1e-5), "one group: the same image gives the same query and key"
    assert not torch.allclose(shuffled.q, shuffled.k, atol=1e-3)


@pytest.mark.parametrize("loss", [*LOSSES])
def test_terms_are_the_losses_of_the_pooled_stages_times_their_weight(loss):
    model, (x_q, x_k) = make(loss, bn_splits=1, momentum=1.0), pair()
    output = model(x_q, x_k)
    pooled = []
    for encoder, x in ((model.encoder_q, x_q), (model.encoder_k, x_k)):
        stages = zip(encoder(x).stages, model.stage_loss.pool, strict=True)
        pooled.append([F.adaptive_avg_pool2d(stage, side) for stage, side in stages])
    for number, term in enumerate(model.stage_loss(*pooled), start=1):
        expected = model.stage_weights[number - 1] * term
        assert torch.allclose(output.terms[f"stage{number}"], expected, rtol=1e-4)


class Cosine(nn.Module):
    """A loss of one's own: nothing but what the interface asks for."""

    pool = (8, 2, 1, 1)

    def __init__(self, channels, power):
        super().__init__()
        self.power, self.gain = power, nn.Parameter(torch.ones(len(channels)))
        self.seen = []

    def forward(self, query, key):
        pairs = list(zip(query, key, self.gain, strict=True))
        self.seen = [(*u.shape[2:], u.dtype, v.dtype, u.requires_grad, v.requires_grad) for u, v, _ in pairs]
        return [g * (1 - F.cosine_similarity(u.flatten(1), v.flatten(1)).mean()) ** self.power for u, v, g in pairs]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_of_ones_own_works_by_the_interface_alone(autocast):
    model = make(partial(Cosine, power=2), stage_weights=(1.0, 0.0, 0.5, 2.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*pair(), shuffle())
    output.loss.backward()
    fp32 = torch.float32
    assert model.stage_loss.seen == [(side, side, fp32, fp32, True, False) for side in (8, 2, 1, 1)]
    assert output.terms["stage2"] == 0 and output.terms["stage4"] > 0
    assert model.stage_loss.gain.grad[1] == 0 and model.stage_loss.gain.grad[3] > 0
    assert [s.shape[2] for s in output.query_stages] == [8, 2, 1, 1]


def test_positives_and_negatives_of_a_key_agree_under_autocast():
    model = make(momentum=1.0, bn_splits=1, queue=16, dim=64, temperature=1.0)
    x_q, x_k = pair(16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model(x_q, x_k)
        model.enqueue(first.keys)
        second = model(x_q, x_k)
    assert torch.equal(first.k, second.k), "the second time every key is in the queue as well"
    positive, negative = second.logits[:, 0], second.logits[:, 1:].diagonal()
    assert torch.allclose(positive, negative, atol=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES])
def test_stage_losses_are_fp32_under_autocast(loss):
    model = make(loss)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*pair(16), shuffle(16))
        alone = model.stage_loss(output.query_stages, output.key_stages)
    assert all(term.dtype == torch.float32 for term in [*output.terms.values(), *alone])
    if loss != "barlow":  # whose projectors keep the caller's precision
        for term, expected in zip(alone, model.stage_loss(output.query_stages, output.key_stages), strict=True):
            assert torch.allclose(term, expected, rtol=1e-5)


def test_a_stage_smaller_than_its_pool_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="8 x 8 cannot be pooled to 9 x 9"):
        make(partial(StageMSE, pool=(4, 9, 1, 1)))(*pair(), shuffle())


@pytest.mark.parametrize("batch, splits", [(8, 8), (7, 4), (1, 1), (3, 2)])
def test_a_batch_norm_group_of_one_image_is_refused(batch, splits):
    with pytest.raises(ValueError, match=f"{batch} in {splits} batch-norm groups"):
        make(bn_splits=splits)(*pair(batch), shuffle(batch))


@pytest.mark.parametrize("batch, splits", [(7, 3), (10, 4), (9, 4), (5, 2)])
def test_a_batch_that_its_groups_do_not_divide_leaves_no_group_of_one(batch, splits):
    model, sizes = make(bn_splits=splits), []
    model.encoder_q.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model(*pair(batch), shuffle(batch))
    assert sum(sizes) == batch and len(sizes) == splits and min(sizes) >= 2


# Groups of two and three images, one and three channels, maps of one pixel; as on a processor without AMX.
SMALLEST = """
import torch
from functools import partial
from mocolayers.method.encoder import StagedResNet
from mocolayers.method.losses import StageMSE
from mocolayers.method.moco import MoCo
torch.set_num_threads(4)
for channels, side, stem, batch in ((1, 28, "small", 4), (3, 16, "small", 5), (1, 32, "imagenet", 4)):
    encoder = partial(StagedResNet, "resnet10", 16, stem, channels)
    model = MoCo(encoder, partial(StageMSE, pool=(1, 1, 1, 1)), (1.0,) * 4, bn_splits=batch // 2)
    model = model.to(memory_format=torch.channels_last)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*torch.rand(2, batch, channels, side, side))
        output.loss.backward()
        model.enqueue(output.keys)
    assert output.loss.isfinite()
"""


def test_the_smallest_groups_train_in_bf16():
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_WAIT_POLICY": "passive"}
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    done = subprocess.run([sys.executable, "-c", SMALLEST], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_every_loss_starts_from_the_same_weights():
    plain = make().state_dict()
    for loss in LOSSES:
        other = make(loss).state_dict()
        assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_query_and_key_encoder_start_equal():
    model = make()
    for query, key in ((model.encoder_q, model.encoder_k), (model.head_q, model.head_k)):
        assert all(torch.equal(a, b) for a, b in zip(query.parameters(), key.parameters(), strict=True))


def test_an_unknown_head_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose 'linear' or 'mlp'"):
        make(head="cubic")
