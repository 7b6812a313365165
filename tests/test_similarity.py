"""Claims about CKA: what it equals, what it ignores, and when it lies."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group

from mocolayers.evaluation.similarity import cka, cka_null, median_distance, patient_interval, released_cka

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
    for n in (60, 700):  # more rows than one block holds
        x, y = related(n)
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
    assert released_cka(x, y)[0] == pytest.approx(1.0, abs=5e-4)
    assert abs(cka(x, y)) < 0.01
    assert abs(cka(x, y, "rbf")) < 0.01
    # Debiased, a kernel without neighbours says nothing, and says so.
    assert np.isnan(cka(x, y, "rbf", sigma=0.8))


def test_the_released_setting_draws_rows_and_reports_their_spread():
    x, y = related(1500)
    mean, std = released_cka(x, y, draws=5)
    assert 0 < std < 0.05
    assert mean == pytest.approx(cka(x, y, "rbf", sigma=0.8, debiased=False), abs=0.1)
    assert released_cka(x[:300], y[:300])[1] == 0


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
        (lambda x, y: (x[:3], y[:3]), "at least 4 rows"),
        (lambda x, y: (np.where(x == x[0, 0], np.nan, x), y), "first features hold 1 values"),
        (lambda x, y: (x[:, 0], y), "same n rows"),
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


def test_the_interval_over_patients_is_as_wide_as_the_statistic_is_uncertain():
    rng, centres = np.random.default_rng(0), []
    for _ in range(200):
        centres.append(np.repeat(rng.normal(size=50), 4).mean())
    values = np.repeat(rng.normal(size=50), 4)
    low, high = patient_interval(lambda rows: values[rows].mean(), np.repeat(np.arange(50), 4), draws=200)
    assert (high - low) / (2 * 1.96 * np.std(centres)) == pytest.approx(1, abs=0.3)
    assert (low + high) / 2 == pytest.approx(values.mean())


def test_twenty_thousand_rows_fit_in_the_memory_of_a_small_machine():
    program = (
        "import re, numpy as np; from mocolayers.similarity import cka;"
        "x, y = np.random.default_rng(0).normal(size=(2, 20_000, 64)).astype('f4');"
        "assert abs(cka(x, y)) < .01 and abs(cka(x, y, 'rbf')) < .01;"
        # getrusage's maximum would hold that of the process that started this one.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1500


def test_draws_cut_from_one_kernel_matrix_equal_draws_on_their_own(monkeypatch):
    x, y = related(1200)
    together = released_cka(x, y, draws=6)
    monkeypatch.setattr("mocolayers.similarity.WHOLE", 0)
    assert released_cka(x, y, draws=6) == pytest.approx(together)
