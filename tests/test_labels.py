"""Claims about label subsets: nested, whole patients, every class, and near the class mix."""

import csv
import re
import time

import numpy as np
import pytest

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import TEST, TRAIN, MedicalImages
from mocolayers.runtime import DatasetError

TASKS = ["binary", "ordinal", "multiclass", "multilabel"]
SEEDS = 40


def with_patients(patients, labels, task="binary"):
    """A data set without pixels: four of five patients train."""
    patients, labels = np.asarray(patients), np.asarray(labels, int)
    number = np.unique(patients, return_inverse=True)[1]
    names = [f"class {c}" for c in range(labels.shape[1] if labels.ndim == 2 else labels.max() + 1)]
    split = np.where(np.random.default_rng(0).permutation(number.max() + 1)[number] % 5 == 0, TEST, TRAIN)
    return MedicalImages("made up", {"task": task, "classes": names}, None, labels, patients, split)


def random_prefix(data, fraction, seed):
    """As many images as asked, of whole patients in a random order: what no stratification gives."""
    rows = data.rows("train")
    names, member = np.unique(data.patients[rows], return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = np.searchsorted(np.bincount(member)[order].cumsum(), fraction * len(rows))
    return rows[np.isin(member, order[: taken + 1])]


def distance(data, subset, fraction):
    """Root mean square, over seeds and classes, of how far the class shares of a subset are from those of the whole."""
    whole = class_matrix(data, data.rows("train")).mean(axis=0)
    gaps = [class_matrix(data, subset(data, fraction, seed)).mean(axis=0) - whole for seed in range(SEEDS)]
    return np.sqrt(np.mean(np.square(gaps)))


def unequal_patients():
    """300 patients with 5 to 80 images, each with its own share of positive ones."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(300), rng.integers(5, 81, 300))
    return with_patients(patients, rng.random(len(patients)) < rng.beta(0.8, 2, 300)[patients])


def breast_patches(samples):
    found = [re.match(r"(\d+)_.*class([01])", p.name) for p in samples.glob("breast_histology_sample/*/[01]/*.png")]
    return with_patients([name[1] for name in found], [name[2] for name in found])


def chest_findings(samples):
    with open(samples / "nih64_sample" / "Data_Entry_2017.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return with_patients([r["Patient ID"] for r in rows], [r["Finding Labels"] != "No Finding" for r in rows])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_subsets_are_nested_whole_patients_and_hold_every_class(make_data, task, seed):
    data = make_data(task=task, n=900)
    subsets = [label_subset(data, fraction, seed) for fraction in (0.01, 0.1, 0.5, 1.0)]
    train = data.rows("train")
    assert np.array_equal(subsets[-1], train)
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert set(small) < set(large)
    for subset, fraction in zip(subsets, (0.01, 0.1, 0.5, 1.0), strict=True):
        assert set(subset) <= set(train) and len(subset) >= fraction * len(train) - 1e-9
        whole = train[np.isin(data.patients[train], data.patients[subset])]
        assert np.array_equal(subset, whole)
        assert class_matrix(data, subset).any(axis=0).all()


def test_a_subset_that_is_large_enough_is_no_larger_than_asked_by_more_than_a_patient(make_data):
    data = make_data(n=900)
    train = len(data.rows("train"))
    for fraction in (0.1, 0.3, 0.7):
        assert len(label_subset(data, fraction, 0)) < fraction * train + 3


def test_subsets_follow_the_seed(make_data):
    data = make_data(n=900)
    assert np.array_equal(label_subset(data, 0.1, 4), label_subset(data, 0.1, 4))
    assert not np.array_equal(label_subset(data, 0.1, 4), label_subset(data, 0.1, 5))


def test_a_fraction_too_small_for_the_classes_is_enlarged_and_says_so(make_data, capsys):
    data = make_data(task="ordinal")
    rows = label_subset(data, 0.001, 0)
    assert class_matrix(data, rows).any(axis=0).all()
    assert "would miss a class" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_fraction_outside_its_range_says_what_to_give(make_data, fraction):
    with pytest.raises(DatasetError, match="0.01 for 1%"):
        label_subset(make_data(), fraction, 0)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1])
def test_a_subset_is_near_the_class_mix_where_patients_are_large(fraction):
    data = unequal_patients()
    assert distance(data, label_subset, fraction) < 0.6 * distance(data, random_prefix, fraction)


@pytest.mark.parametrize("make", [breast_patches, chest_findings])
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_a_subset_of_real_patients_is_near_the_class_mix(samples, make, fraction):
    data = make(samples)
    assert distance(data, label_subset, fraction) < 0.6 * distance(data, random_prefix, fraction)


def test_patients_with_few_images_are_not_preferred():
    data = unequal_patients()
    train = data.rows("train")
    whole = len(train) / len(np.unique(data.patients[train]))
    subsets = [label_subset(data, 0.1, seed) for seed in range(SEEDS)]
    assert np.mean([len(s) / len(np.unique(data.patients[s])) for s in subsets]) == pytest.approx(whole, rel=0.05)


def test_subsets_of_other_seeds_share_few_patients():
    data = unequal_patients()
    subsets = [set(data.patients[label_subset(data, 0.05, seed)]) for seed in range(SEEDS)]
    shared = [len(a & b) / min(len(a), len(b)) for n, a in enumerate(subsets) for b in subsets[:n]]
    assert np.mean(shared) < 0.1, "0.05 if they were drawn at random"


def test_thirty_thousand_patients_are_ordered_in_two_seconds():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(37_500), rng.integers(1, 8, 37_500))
    data = with_patients(patients, rng.random((len(patients), 14)) < 0.05, "multilabel")
    start = time.process_time()
    label_subset(data, 0.01, 0)
    assert time.process_time() - start < 2
