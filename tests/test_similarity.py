"""Claims about CKA: what it equals, what it ignores, and when it lies."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group

from mocolayers.evaluation import similarity as module
from mocolayers.evaluation.features import stage_features
from mocolayers.evaluation.judge import fine_tuned
from mocolayers.evaluation.similarity import (
    cka,
    cka_null,
    feature_reuse,
    median_distance,
    patient_interval,
    released_cka,
    some_rows,
    weights_moved,
)
from mocolayers.recipe import Evaluation

PLAN = Evaluation(fractions=(0.1, 1.0), subsets=2, least_steps=6, batch=16, checks=3, resamples=100)

SETTINGS = [{"debiased": d, **k} for d in (False, True) for k in ({}, {"kernel": "rbf"}, {"kernel": "rbf", "sigma": 3})]


def related(n=60, d=7, seed=0):
    """Two feature sets that share half of their directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.5, 3, d)
    return x, x @ rng.normal(size=(d, 5)) + 2 * rng.normal(size=(n, 5)) + 10


def gram(x, kernel="linear", sigma=None, **_):
    if kernel == "linear":
        return x @ x.T
    distance = cdist(x, x)
    sigma = sigma or np.median(distance[np.triu_indices(len(x), 1)])
    return np.exp(-(distance**2) / (2 * sigma**2))


def centred_trace(k, m):
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ m @ h)


def u_centred_product(k, m):
    def u_centre(a):
        n = len(a)
        a = a - np.diag(np.diag(a))
        sums = a.sum(axis=0) / (n - 2)
        a = a - sums[:, None] - sums[None] + a.sum() / ((n - 1) * (n - 2))
        return a - np.diag(np.diag(a))

    return (u_centre(k) * u_centre(m)).sum()


def by_definition(x, y, debiased, **kernel):
    product = u_centred_product if debiased else centred_trace
    k, m = gram(x, **kernel), gram(y, **kernel)
    return product(k, m) / np.sqrt(product(k, k) * product(m, m))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_cka_equals_its_definition_on_whole_kernel_matrices(setting):
    x, y = related()
    assert cka(x, y, **setting) == pytest.approx(by_definition(x, y, **setting), abs=1e-6)


def test_the_debiased_estimate_is_the_mean_over_four_different_rows():
    x, y = related(8, 3)
    k, m = x @ x.T, y @ y.T

    def hsic(k, m):
        quads = itertools.permutations(range(8), 4)
        return np.mean([k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quads])

    assert cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-6)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "sigma" not in s], ids=str)
def test_cka_ignores_rotation_scale_and_shift(setting):
    x, y = related()
    turned = 7 * x @ ortho_group.rvs(x.shape[1], random_state=0) - 3
    assert cka(turned, y, **setting) == pytest.approx(cka(x, y, **setting), abs=1e-6)
    assert cka(x, turned, **setting) == pytest.approx(1)


def test_an_absolute_bandwidth_does_not_ignore_scale():
    x, y = related()
    assert abs(cka(x / 3, y, "rbf", sigma=3) - cka(x, y, "rbf", sigma=3)) > 0.05


def test_cka_does_not_ignore_stretching_one_direction():
    x, y = related()
    assert abs(cka(x * [20, 1, 1, 1, 1, 1, 1], y) - cka(x, y)) > 0.05


def test_independent_features_score_zero_only_when_debiased():
    rng = np.random.default_rng(0)
    values = {True: [], False: []}
    for _ in range(20):
        x, y = rng.normal(size=(2, 100, 200))
        for debiased, found in values.items():
            found.append(cka(x, y, debiased=debiased))
    assert abs(np.mean(values[True])) < 0.01
    assert np.mean(values[False]) > 0.6


def test_the_released_setting_calls_two_independent_feature_sets_identical():
    """PAPER: d = 256, unit scale, n = 1000."""
    x, y = np.random.default_rng(0).normal(size=(2, 1000, 256))
    assert released_cka(x, y) == pytest.approx(1.0, abs=5e-4)
    assert abs(cka(x, y)) < 0.01
    assert abs(cka(x, y, "rbf")) < 0.01
    # Debiased, a kernel without neighbours says nothing, and says so.
    assert np.isnan(cka(x, y, "rbf", sigma=0.8))


def test_the_released_setting_draws_rows():
    x, y = related(1500)
    one, many = (released_cka(x, y, draws) for draws in (1, 5))
    whole = cka(x, y, "rbf", sigma=0.8, debiased=False)
    assert one != many and many == pytest.approx(whole, abs=0.1)
    assert released_cka(x[:300], y[:300]) == cka(x[:300], y[:300], "rbf", sigma=0.8, debiased=False)


def test_permuted_rows_are_the_null():
    x, y = related(300)
    assert cka(x, y) > 0.3
    assert np.abs(cka_null(x, y)).max() < 0.05


def test_features_that_do_not_vary_have_no_similarity():
    x, _ = related()
    for setting in SETTINGS:
        assert np.isnan(cka(x, np.ones((60, 3)), **setting))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:-1], y), "same n rows"),
        (lambda x, y: (x[:3], y[:3]), "of at least 4 rows"),
        (lambda x, y: (np.where(x == x[0, 0], np.nan, x), y), "features hold 1 values"),
        (lambda x, y: (x[:, 0], y), "of at least 4 rows"),
    ],
)
def test_bad_features_are_refused_with_a_reason(change, message):
    with pytest.raises(ValueError, match=message):
        cka(*change(*related()))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="choose 'linear' or 'rbf'"):
        cka(*related(), kernel="cosine")


def test_the_median_distance_is_that_of_all_pairs():
    x, _ = related()
    assert median_distance(x) == pytest.approx(np.median(cdist(x, x)[np.triu_indices(60, 1)]))


def test_too_few_patients_for_an_interval_have_none():
    assert np.isnan(module.patient_interval(len, np.arange(7))).all()


def test_the_interval_over_patients_is_as_wide_as_the_statistic_is_uncertain():
    rng, centres = np.random.default_rng(0), []
    for _ in range(200):
        centres.append(np.repeat(rng.normal(size=50), 4).mean())
    values = np.repeat(rng.normal(size=50), 4)
    low, high = patient_interval(lambda rows: values[rows].mean(), np.repeat(np.arange(50), 4), draws=200)
    assert (high - low) / (2 * 1.96 * np.std(centres)) == pytest.approx(1, abs=0.3)
    assert (low + high) / 2 == pytest.approx(values.mean())


@pytest.mark.parametrize("setting", [{}, {"kernel": "rbf"}], ids=str)
def test_of_many_rows_two_thousand_paired_ones_say_the_same(setting):
    x, y = related(3000)
    chosen = some_rows(3000)
    assert len(np.unique(chosen)) == 2000
    assert cka(x, y, **setting) == cka(x[chosen], y[chosen], **setting)
    assert cka(x, y, **setting) == pytest.approx(by_definition(x, y, True, **setting), abs=0.02)
    assert abs(cka_null(x, y, draws=2)).max() < 0.02


def test_features_of_an_encoder_that_did_not_move_are_fully_reused(pretrained, monkeypatch):
    data, run = pretrained()
    unmoved = type("Model", (), {"encoder": run.load_encoder()})
    monkeypatch.setattr(module, "fine_tuned", lambda *_: (unmoved, None))
    table = feature_reuse(run, data, PLAN, 1.0)
    assert table["linear"].to_numpy() == pytest.approx(np.ones(4))
    assert table["moved"].to_numpy() == pytest.approx(np.zeros(4))


def test_feature_reuse_compares_the_same_rows_before_and_after(pretrained):
    data, run = pretrained()
    table = feature_reuse(run, data, PLAN, 0.1)
    rows = data.rows("test")
    before = stage_features(run.load_encoder(), data, rows)
    after = stage_features(fine_tuned(run, data, 0.1, 0, PLAN)[0].encoder, data, rows)
    assert table["linear"].to_numpy() == pytest.approx([cka(x, y) for x, y in zip(before, after, strict=True)])
    assert ((table["low"] <= table["linear"]) & (table["linear"] <= table["high"])).all()
    assert (table["null"].abs() < 0.2).all()
    assert (table["moved"] > 0).all()


def test_how_far_weights_moved_is_relative_to_their_norm(pretrained):
    _, run = pretrained()
    before, after = run.load_encoder(), run.load_encoder()
    with torch.no_grad():
        for p in after.layer2.parameters():
            p.mul_(1.25)
    assert weights_moved(before, after) == pytest.approx([0, 0.25, 0, 0])
