"""Claims about fine-tuning."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mocolayers.data.labels import label_subset
from mocolayers.evaluation.finetune import Classifier, fine_tune, row_order
from mocolayers.recipe import EVALUATIONS, Evaluation
from mocolayers.runtime import RunError

PLAN = Evaluation(epochs=2, least_steps=6, batch=16, checks=3, resamples=20)


@pytest.fixture
def looks(monkeypatch):
    """A list of what every look at validation found: rows, weights and probabilities."""
    seen, predict = [], Classifier.predict

    def recorded(model, data, rows):
        probabilities = predict(model, data, rows)
        seen.append((rows, copy.deepcopy(model.state_dict()), probabilities))
        return probabilities

    monkeypatch.setattr(Classifier, "predict", recorded)
    return seen


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("count", [9, 47, 4708])
def test_every_labelled_image_is_read_in_every_epoch_and_in_another_order(name, count):
    plan, rows = EVALUATIONS[name], np.arange(100, 100 + count)
    order = row_order(rows, plan, seed=0)
    assert order.size >= plan.epochs * count and len(order) >= plan.least_steps
    assert len(order) == plan.least_steps or order.size < plan.epochs * count + plan.batch
    epochs = [order.ravel()[start : start + count] for start in range(0, order.size - count + 1, count)]
    assert all(np.array_equal(np.sort(epoch), rows) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 0.9 * len(epochs)
    assert np.array_equal(order, row_order(rows, plan, seed=0))
    assert not np.array_equal(order, row_order(rows, plan, seed=1))


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_the_images_that_are_read_are_all_that_are_labelled(make_data, pretrained, watched, fraction):
    data, run = pretrained(n=500)
    rows, asked = label_subset(data, fraction, 0), watched(data)
    model = fine_tune(run.load_encoder(), data, rows, PLAN, 0)
    read = np.setdiff1d(np.concatenate(asked), data.rows("val"))
    assert np.array_equal(read, rows)
    assert model.labels_read == len(rows)


def test_the_weights_that_did_best_on_validation_are_returned(pretrained, looks):
    data, run = pretrained()
    plan = Evaluation(epochs=1, least_steps=40, batch=16, checks=8, lr=0.01)
    model = fine_tune(run.load_encoder(), data, data.rows("train"), plan, 0)
    assert len(looks) == 8
    reached = [roc_auc_score(data.labels[rows], p[:, 1]) for rows, _, p in looks]
    assert reached.index(max(reached)) < 7, "the last look is the best one: the case shows nothing"
    best = looks[reached.index(max(reached))][1]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_with_one_class_on_validation_the_smallest_loss_is_kept(pretrained, looks):
    data, run = pretrained()
    split = np.where((data.split == 1) & (data.labels == 0), 2, data.split)
    data = dataclasses.replace(data, split=split)
    plan = Evaluation(least_steps=40, checks=8, lr=1e-4, batch=16)
    model = fine_tune(run.load_encoder(), data, data.rows("train"), plan, 0)
    losses = [-np.log(p[:, 1]).mean() for _, _, p in looks]
    assert losses.index(min(losses)) > 0, "the first look is the best one: the case shows nothing"
    best = looks[losses.index(min(losses))][1]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_a_training_that_diverges_is_one_clear_error(pretrained):
    data, run = pretrained()
    with pytest.raises(RunError, match="diverged by step 5; lower its learning rate, which is 1e"):
        fine_tune(run.load_encoder(), data, data.rows("train"), Evaluation(lr=1e30, least_steps=20, batch=16), 0)


def test_no_test_image_is_read_and_the_encoder_stays_as_it_was(pretrained, watched):
    data, run = pretrained()
    asked = watched(data)
    encoder = run.load_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fine_tune(encoder, data, data.rows("train"), PLAN, 0)
    assert not set(np.concatenate(asked)) & set(data.rows("test"))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_out_of_memory_is_one_line_with_batch_and_side(pretrained, monkeypatch):
    data, run = pretrained()

    def fails(model, x):
        raise torch.OutOfMemoryError("in its own words")

    monkeypatch.setattr(Classifier, "forward", fails)
    with pytest.raises(RunError, match="out of memory: a batch of 16 images of 16 px.*--side.*--device cpu"):
        fine_tune(run.load_encoder(), data, data.rows("train"), PLAN, 0)
