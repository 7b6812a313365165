"""Claims about judging encoders."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.evaluation import finetune as module
from mocolayers.evaluation.features import encode_splits
from mocolayers.evaluation.finetune import fine_tune
from mocolayers.evaluation.judge import evaluate
from mocolayers.evaluation.probes import linear_evaluation
from mocolayers.evaluation.scores import macro_auc
from mocolayers.recipe import ARMS, Evaluation
from study.run import judge

PLAN = Evaluation(fractions=(0.1, 1.0), subsets=2, steps=6, batch=16, check_every=2, resamples=20)


def test_linear_evaluation_equals_a_plain_scikit_learn_pipeline(pretrained):
    data, run = pretrained()
    features = encode_splits(run.load_encoder(), data)
    rows = label_subset(data, 0.5, 0)
    ours, penalty = linear_evaluation(features, data, rows, PLAN)
    x = features["train"][np.searchsorted(data.rows("train"), rows)]
    plain = LogisticRegression(C=penalty, max_iter=2000, solver=module.solver(*x.shape, len(data.classes)))
    model = make_pipeline(StandardScaler(), plain).fit(x, data.labels[rows])
    assert np.allclose(ours, model.predict_proba(features["test"]))


@pytest.mark.parametrize("kinds", [2, 3])
def test_both_solvers_end_with_the_same_probabilities(kinds, monkeypatch):
    rng = np.random.default_rng(0)
    target = rng.integers(0, kinds, 300)
    x = rng.normal(size=(300, 8)) + target[:, None] * rng.normal(size=8)
    classes = target[:, None] == np.arange(kinds)
    found = {}
    for name in ("newton-cholesky", "lbfgs"):
        assert name == "lbfgs" or module.solver(*x.shape, kinds) == name
        monkeypatch.setattr(module, "solver", lambda *_, name=name: name)
        found[name] = module.LinearProbe("multiclass", 0.1).fit(x, classes).predict(x)
    assert np.allclose(*found.values(), atol=1e-3)


def test_features_that_are_almost_the_same_are_fitted_without_a_warning(recwarn):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(1000, 1)), 100, axis=1).astype(np.float32)
    x += 1e-4 * rng.normal(size=x.shape).astype(np.float32)
    classes = (x[:, :1] + rng.normal(size=(1000, 1)) > 0) == np.array([False, True])
    probabilities = module.LinearProbe("binary", 1000.0).fit(x, classes).predict(x)
    assert not recwarn.list and macro_auc(classes, probabilities)[0] > 0.7


def test_newtons_method_is_left_where_its_matrix_would_be_large():
    assert module.solver(5000, 2000, 2) == "lbfgs" and module.solver(30, 128, 2) == "lbfgs"


def test_the_penalty_is_the_best_on_validation(pretrained):
    data, run = pretrained(n=600)
    features = encode_splits(run.load_encoder(), data)
    rows, truth = label_subset(data, 0.5, 0), class_matrix(data, data.rows("val"))
    _, chosen = linear_evaluation(features, data, rows, PLAN)
    reached = {}
    for penalty in PLAN.penalties:
        x = features["train"][np.searchsorted(data.rows("train"), rows)]
        model = module.LinearProbe(data.task, penalty).fit(x, class_matrix(data, rows))
        reached[penalty] = macro_auc(truth, model.predict(features["val"]))[0]
    assert reached[chosen] == max(reached.values())


def test_encoding_moves_no_batch_norm_statistics(pretrained):
    data, run = pretrained()
    encoder = run.load_encoder()
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    encode_splits(encoder.train(), data)
    assert all(torch.equal(b, before[name]) for name, b in encoder.named_buffers())


def test_fine_tuning_returns_the_weights_that_did_best_on_validation(pretrained, monkeypatch):
    data, run = pretrained()
    scripted, seen = iter([0.6, 0.9, 0.7]), []
    real_step = module._fine_tune_step

    def recorded_step(model, *rest):
        real_step(model, *rest)
        seen.append(copy.deepcopy(model.state_dict()))

    monkeypatch.setattr(module, "macro_auc", lambda truth, probabilities: np.array([next(scripted)]))
    monkeypatch.setattr(module, "_fine_tune_step", recorded_step)
    model = fine_tune(run.load_encoder(), data, data.rows("train"), PLAN, 0)
    best = seen[3]  # checks after steps 2, 4 and 6; the second was best
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.head.weight, seen[5]["head.weight"])


def test_fine_tuning_never_reads_a_test_image_and_leaves_the_run_as_it_was(pretrained, watched):
    data, run = pretrained()
    asked = watched(data)
    encoder = run.load_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fine_tune(encoder, data, data.rows("train"), PLAN, 0)
    assert not set(np.concatenate(asked)) & set(data.rows("test"))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal", "multiclass"])
def test_every_task_is_judged_in_both_modes(pretrained, task):
    data, run = pretrained(task=task, n=400)
    rows = judge(run, data, PLAN)
    assert len(rows) == 2 * 2 - 1 + 2, "two subsets at 10%, one at 100%, linear; one each fine-tuned"
    for row in rows:
        assert 0 <= row["low"] <= row["high"] <= 1 and 0 <= row["auc"] <= 1
        assert row["recipe"] == run.recipe.key
    assert ("kappa" in rows[0]) == (task == "ordinal")


def test_an_evaluation_is_done_once_and_then_read(pretrained, monkeypatch):
    data, run = pretrained()
    first = evaluate(run, data, "linear", 0.1, 0, PLAN)
    monkeypatch.setattr(module, "linear_evaluation", None)
    assert evaluate(run, data, "linear", 0.1, 0, PLAN) == first


def test_another_data_set_is_another_evaluation(pretrained, make_data):
    data, run = pretrained()
    first = evaluate(run, data, "linear", 0.1, 0, PLAN)
    other = make_data(name="other", n=300, seed=5)
    assert other.fingerprint != data.fingerprint
    assert evaluate(run, other, "linear", 0.1, 0, PLAN)["labels"] != first["labels"]
    assert evaluate(run, data, "linear", 0.1, 0, PLAN) == first


@pytest.mark.parametrize("arm", ARMS)
def test_random_is_judged_frozen_supervised_by_training_and_the_rest_both_ways(pretrained, arm):
    data, run = pretrained(arm)
    modes = {row["mode"] for row in judge(run, data, PLAN)}
    assert modes == {"random": {"linear"}, "supervised": {"finetune"}}.get(arm, {"linear", "finetune"})


def test_a_label_that_the_subset_never_shows_is_predicted_at_its_rate():
    x, classes = np.random.default_rng(0).normal(size=(20, 3)), np.zeros((20, 2), bool)
    classes[::2, 0] = True
    assert (module.LinearProbe("multilabel", 1.0).fit(x, classes).predict(x)[:, 1] == 0).all()


def test_an_unknown_mode_lists_the_known_ones(pretrained):
    data, run = pretrained()
    with pytest.raises(ValueError, match="linear, finetune"):
        evaluate(run, data, "knn", 0.1, 0, PLAN)
