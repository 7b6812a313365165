"""Claims about scores and intervals."""

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mocolayers.evaluation.scores import (
    calibration_error,
    macro_auc,
    patient_bootstrap,
    patient_weights,
    reliability,
    scores,
)
from mocolayers.runtime import DatasetError


def problem(n=300, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.random((n, labels)) < 0.3
    # Rounding makes ties.
    return classes, np.round(classes * 0.4 + rng.random((n, labels)), 1)


def test_macro_auc_equals_scikit_learn_with_ties():
    classes, p = problem()
    assert macro_auc(classes, p)[0] == pytest.approx(roc_auc_score(classes, p, average="macro"))


def test_macro_auc_equals_scikit_learn_with_weights():
    classes, p = problem(labels=1)
    weights = np.random.default_rng(1).integers(0, 4, (5, len(p))).astype(float)
    theirs = [roc_auc_score(classes[:, 0], p[:, 0], sample_weight=w) for w in weights]
    assert macro_auc(classes, p, weights) == pytest.approx(np.array(theirs))


def test_a_label_of_one_kind_is_left_out_of_the_mean():
    classes, p = problem()
    alone = macro_auc(classes[:, :2], p[:, :2])[0]
    classes[:, 2] = False
    assert macro_auc(classes, p)[0] == pytest.approx(alone)


def test_patients_are_resampled_whole():
    patients = np.repeat(np.arange(20), 5)
    weights = patient_weights(patients, 50).reshape(50, 20, 5)
    assert (weights == weights[:, :, :1]).all()
    assert (weights[:, :, 0].sum(axis=1) == 20).all()


def test_copies_of_an_image_do_not_make_the_interval_narrower():
    classes, p = problem(100, 1)
    single = np.subtract(*patient_bootstrap(classes, p, np.arange(100)))
    nine = [np.repeat(x, 9, axis=0) for x in (classes, p, np.arange(100))]
    assert np.subtract(*patient_bootstrap(*nine)) == pytest.approx(single, rel=0.05)
    as_if_independent = np.subtract(*patient_bootstrap(nine[0], nine[1], np.arange(900)))
    assert abs(as_if_independent) < abs(single) / 2


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, truth, hits = np.random.default_rng(0), None, 0
    truth = 0.7602  # area for a shift of one standard deviation: Phi(1 / sqrt 2)
    for seed in range(60):
        y = np.arange(200) % 2 == 1
        low, high = patient_bootstrap(y[:, None], (rng.normal(size=200) + y)[:, None], np.arange(200), 300, seed)
        hits += low <= truth <= high
    assert 51 <= hits <= 60


def test_a_test_split_of_one_class_is_a_clear_error():
    with pytest.raises(DatasetError, match="same class"):
        patient_bootstrap(np.ones((10, 1), bool), np.zeros((10, 1)), np.arange(10))


def test_scores_that_are_nan_are_refused():
    classes, p = problem()
    p[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 scores are NaN; did the training diverge"):
        macro_auc(classes, p)


def test_five_hundred_resamples_of_six_hundred_images_take_less_than_a_second():
    classes, p = problem(624, 2)
    started = time.process_time()
    patient_bootstrap(classes, p, np.arange(624) // 2, 500)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("task", ["binary", "ordinal", "multiclass"])
def test_scores_of_perfect_predictions_are_one_and_kappa_is_for_grades(task):
    classes = np.eye(3, dtype=bool)[np.random.default_rng(0).integers(0, 3, 50)]
    found = scores(task, classes, classes.astype(float))
    assert found.pop("kappa") == 1 if task == "ordinal" else np.isnan(found.pop("kappa"))
    assert found == {"auc": 1, "f1": 1}


def test_a_grade_that_nobody_has_still_counts_as_a_step_of_kappa():
    truth, guess = np.array([0, 0, 0, 4, 4, 3, 3, 0, 4, 3]), np.array([0, 0, 3, 4, 3, 3, 4, 0, 0, 3])
    found = scores("ordinal", truth[:, None] == np.arange(5), np.eye(5)[guess])["kappa"]
    by_chance = np.square(truth[:, None] - guess).mean()
    assert found == pytest.approx(1 - np.square(truth - guess).mean() / by_chance)


def test_a_calibrated_model_has_no_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    classes, probabilities = (rng.random(50_000) < p)[:, None] == [False, True], np.stack([1 - p, p], axis=1)
    assert calibration_error(classes, probabilities, "binary") < 0.01
    sure = np.round(probabilities)
    assert calibration_error(classes, sure, "binary") == pytest.approx(0.25, abs=0.01)


def test_reliability_counts_every_prediction_once():
    rng = np.random.default_rng(0)
    table = reliability(rng.random((90, 3)) < 0.5, rng.random((90, 3)), "multilabel")
    assert table["share"].sum() == pytest.approx(1)
    assert (np.abs(table["probability"] - (np.arange(10) + 0.5) / 10) < 0.05).all()
