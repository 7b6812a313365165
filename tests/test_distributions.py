"""Claims about the distance between two models' outputs."""

import numpy as np
import pytest
from scipy.stats import ks_2samp

from mocolayers.evaluation import distributions as module
from mocolayers.evaluation.distributions import (
    compare_outputs,
    flatten,
    ks_by_class,
    ks_distance,
    ks_interval,
    matching_temperature,
    mean_entropy,
    output_distances,
)
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.evaluation.scores import macro_auc, patient_weights
from mocolayers.recipe import Evaluation

PLAN = Evaluation(fractions=(0.1, 1.0), subsets=2, least_steps=6, batch=16, checks=3, resamples=20)


def outputs(n=80, labels=2, seed=0, digits=3):
    """(n, L) probabilities of a model of exclusive classes, rounded so that ties occur."""
    p = np.random.default_rng(seed).random((n, labels)) ** (1 + seed)
    return np.round(p / p.sum(axis=1, keepdims=True), digits)


def brute_force(p, q):
    return max(abs(np.mean(p <= t) - np.mean(q <= t)) for t in np.concatenate([p, q]))


@pytest.mark.parametrize("digits", [1, 6])
def test_ks_equals_a_brute_force_search_over_all_thresholds(digits):
    p, q = outputs(digits=digits)[:, 0], outputs(seed=1, digits=digits)[:, 0]
    assert ks_distance(p, q)[0] == pytest.approx(brute_force(p, q))


@pytest.mark.parametrize("digits", [1, 6])
def test_weighted_ks_is_that_of_rows_repeated_as_often(digits):
    p, q = outputs(digits=digits)[:, 0], outputs(seed=1, digits=digits)[:, 0]
    weights = patient_weights(np.arange(80) // 4, 10)
    repeated = [np.repeat(np.arange(80), w.astype(int)) for w in weights]
    expected = [ks_2samp(p[rows], q[rows], method="asymp").statistic for rows in repeated]
    assert ks_distance(p, q, weights) == pytest.approx(np.array(expected))


def test_a_model_is_at_no_distance_from_itself_even_with_its_rows_permuted():
    """D compares distributions, not predictions: a model that assigns its outputs at random is not noticed."""
    p = outputs()[:, 0]
    assert ks_distance(p, p)[0] == 0
    assert ks_distance(p, np.random.default_rng(0).permutation(p))[0] == 0


def test_flattening_both_models_alike_does_not_move_the_distance():
    p, q = outputs(digits=6), outputs(seed=1, digits=6)
    flat = [flatten(x, "binary", 5.0) for x in (p, q)]
    assert mean_entropy(flat[0], "binary") > mean_entropy(p, "binary") + 0.05
    assert ks_distance(flat[0][:, 1], flat[1][:, 1])[0] == pytest.approx(ks_distance(p[:, 1], q[:, 1])[0])


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal"])
def test_flattening_makes_a_model_less_sure_and_keeps_probabilities(task):
    p = outputs(labels=2 if task == "binary" else 4, digits=6)
    flat = flatten(p, task, 10.0)
    assert mean_entropy(flat, task) > mean_entropy(p, task)
    assert ((flat >= 0) & (flat <= 1)).all()
    if task != "multilabel":
        assert flat.sum(axis=1) == pytest.approx(np.ones(80))
    assert flatten(p, task, 1.0) == pytest.approx(p, abs=1e-6)


def test_flattening_a_binary_or_multilabel_model_ranks_rows_as_before():
    classes = np.random.default_rng(3).random((80, 2)) < 0.5
    for task in ("binary", "multilabel"):
        p = outputs(digits=6)
        assert macro_auc(classes, flatten(p, task, 7.0)) == pytest.approx(macro_auc(classes, p))


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_matching_temperature_makes_one_model_as_flat_as_the_other(task):
    p, q = outputs(digits=6), outputs(seed=3, digits=6)
    for first, second in ((p, q), (q, p)):
        t = matching_temperature(first, second, task)
        assert mean_entropy(flatten(first, task, t), task) == pytest.approx(mean_entropy(second, task), abs=1e-4)
    assert matching_temperature(p, p, task) == pytest.approx(1, abs=1e-3)


def test_a_target_beyond_reach_gets_the_last_temperature_that_is_tried():
    even, sure = np.full((10, 2), 0.5), np.eye(2)[np.arange(10) % 2]
    assert matching_temperature(outputs(), even, "binary") == pytest.approx(50, rel=1e-4)
    assert matching_temperature(outputs(digits=6), sure, "binary") == pytest.approx(0.02, rel=1e-4)


def test_a_constant_predictor_is_a_step():
    p, constant = outputs()[:, 0], np.full(80, 0.4)
    assert ks_distance(p, constant)[0] == pytest.approx(max(np.mean(p < 0.4), np.mean(p > 0.4)), abs=0.02)


@pytest.mark.parametrize("value", [np.nan, 1.5, -0.1])
def test_what_is_no_probability_is_refused(value):
    p, q = outputs()[:, 0].copy(), outputs(seed=1)[:, 0]
    p[3] = value
    for pair in ((p, q), (q, p)):
        with pytest.raises(ValueError, match="have to be from 0 to 1; NaN comes from a training that diverged"):
            ks_distance(*pair)


def test_models_judged_on_other_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        ks_distance(outputs()[:, 0], outputs(70)[:, 0])


def test_a_binary_task_is_compared_once_and_other_tasks_class_by_class():
    assert ks_by_class(outputs(), outputs(seed=1), "binary").shape == (1, 1)
    p, q = outputs(labels=4), outputs(labels=4, seed=1)
    each = ks_by_class(p, q, "multilabel")[0]
    assert each == pytest.approx([brute_force(p[:, c], q[:, c]) for c in range(4)])


def test_pooling_can_hide_what_the_mean_over_classes_shows():
    low, high = np.linspace(0, 0.4, 50), np.linspace(0.6, 1, 50)
    first, second = np.stack([low, high], axis=1), np.stack([high, low], axis=1)
    table = compare_outputs(first, second, second, "multilabel")
    assert table["ks"].tolist() == [1, 1, 1, 0]


def test_the_interval_covers_patients_and_pairs():
    base, patients = outputs(digits=6), np.arange(80) // 4
    near = [(base, flatten(base, "binary", 1.1))] * 3
    mixed = near[:2] + [(base, 1 - base)]
    mean, low, high = ks_interval(near, "binary", patients, 200)
    assert low - 0.05 < mean <= high
    wide_mean, wide_low, wide_high = ks_interval(mixed, "binary", patients, 200)
    assert wide_high - wide_low > high - low
    assert wide_mean == pytest.approx(np.mean([ks_by_class(*pair, "binary").mean() for pair in mixed]))


def test_copies_of_an_image_do_not_make_the_interval_narrower():
    p, q = outputs(40, digits=6), outputs(40, seed=1, digits=6)
    _, low, high = ks_interval([(p, q)], "binary", np.arange(40), 300)
    nine = [np.repeat(x, 9, axis=0) for x in (p, q, np.arange(40))]
    _, low9, high9 = ks_interval([(nine[0], nine[1])], "binary", nine[2], 300)
    assert (low9, high9) == pytest.approx((low, high))


def test_output_distances_are_those_of_the_kept_probabilities(pretrained):
    data, run = pretrained(task="multilabel")
    table = output_distances(run, data, PLAN, 0.1)
    assert table["class"].tolist() == [*data.classes, "mean", "pooled"]
    small, large = fine_tuned(run, data, 0.1, 0, PLAN)[1], fine_tuned(run, data, 1.0, 0, PLAN)[1]
    assert table["ks"][:3].to_numpy() == pytest.approx(ks_by_class(small, large, data.task)[0])
    mean = table[table["class"] == "mean"].iloc[0]
    assert mean["ks"] == pytest.approx(table["ks"][:3].mean())
    assert mean["low"] <= mean["high"]


def test_the_floor_compares_two_seeds_on_all_labels(pretrained):
    data, run = pretrained()
    table = output_distances(run, data, PLAN, 0.1)
    first, second = (fine_tuned(run, data, 1.0, draw, PLAN)[1] for draw in (0, 1))
    assert 0 < table["floor"][0] == pytest.approx(ks_by_class(first, second, data.task)[0, 0])


def test_a_flatter_copy_of_a_model_is_far_away_though_it_ranks_alike():
    p = np.random.default_rng(0).beta(0.3, 0.3, 400)
    large = np.stack([1 - p, p], axis=1)
    logits = np.log(large.clip(1e-12)) / 6
    small = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    row = compare_outputs(small, large, large, "binary").iloc[0]
    assert row["ks"] > 0.2
    assert row["flattened"] == pytest.approx(row["ks"], abs=0.01)
    assert row["matched"] < 0.02
    assert row["floor"] == 0
    assert row["temperature"] == pytest.approx(6, rel=0.01)


def test_worthless_rows_say_so(pretrained, monkeypatch):
    data, run = pretrained(task="multilabel")
    n = len(data.rows("test"))
    p = np.random.default_rng(0).random((n, 3))
    constant = p.copy()
    constant[:, 1] = 0.3
    monkeypatch.setattr(module, "fine_tuned", lambda *a: (None, constant if a[2] < 1 else p))
    data.labels.flags.writeable = True
    data.labels[data.rows("test"), 2] = 0
    notes = output_distances(run, data, PLAN, 0.1)["note"].tolist()
    assert notes[0] == ""
    assert notes[1] == "the model with few labels says the same of every image"
    assert notes[2] == "the test split has one kind of image only"
