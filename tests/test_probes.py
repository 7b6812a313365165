"""Claims about linear evaluation: the optimum is reached, and C is chosen on validation."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from mocolayers.data.labels import class_matrix, label_subset
from mocolayers.data.prepared import say_once
from mocolayers.evaluation import probes as module
from mocolayers.evaluation.features import run_features
from mocolayers.evaluation.probes import GPUProbe, fit_probe, linear_evaluation, predict
from mocolayers.evaluation.scores import macro_auc
from mocolayers.recipe import Evaluation

PLAN = Evaluation(penalties=(0.001, 0.01, 0.1, 1.0, 10.0))


def correlated(n, kinds=2, width=64, noise=0.02, seed=0):
    """Features of which only eight directions vary much, as those of an encoder, and classes that they tell of."""
    mixing, rng = np.random.default_rng(0).normal(size=(8, width)), np.random.default_rng(seed)
    causes = rng.normal(size=(n, 8))
    x = (causes @ mixing + noise * rng.normal(size=(n, width))).astype(np.float32)
    target = (causes[:, :kinds] + rng.normal(size=(n, kinds))).argmax(axis=1)
    return x, target[:, None] == np.arange(kinds)


def exact(x, target, penalty, new):
    """Probabilities of the optimum, by Newton's method down to rounding."""
    scaler = StandardScaler().fit(x.astype(float))
    model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-10)
    return model.fit(scaler.transform(x.astype(float)), target).predict_proba(scaler.transform(new.astype(float)))


@pytest.mark.parametrize("penalty", [0.1, 3000.0])
@pytest.mark.parametrize("kinds", [2, 3])
def test_the_auc_is_that_of_the_optimum_which_the_default_tolerance_misses(kinds, penalty, recwarn):
    (x, classes), (new, truth) = correlated(200, kinds), correlated(3000, kinds, seed=1)
    found = macro_auc(truth, predict(fit_probe(x, classes, "multiclass", penalty), new, kinds))[0]
    wanted = macro_auc(truth, exact(x, classes.argmax(axis=1), penalty, new))[0]
    assert found == pytest.approx(wanted, abs=1e-4)
    assert not recwarn.list
    loose = StandardScaler().fit(x)
    model = LogisticRegression(C=penalty, max_iter=2000).fit(loose.transform(x), classes.argmax(axis=1))
    missed = abs(macro_auc(truth, model.predict_proba(loose.transform(new)))[0] - wanted)
    assert missed > 3e-4 or penalty < 1, "the case is too easy to tell the tolerances apart"


def test_the_gradient_of_the_penalised_loss_is_zero_where_a_probe_ends():
    x, classes = correlated(300)
    probe = fit_probe(x, classes, "binary", 2.0)
    z, p = probe[0].transform(x.astype(float)), predict(probe, x, 2)[:, 1]
    # Hosmer and Lemeshow: the weights are C times the sum of features times residuals, and residuals add up to 0.
    assert probe[-1].coef_[0] == pytest.approx(2.0 * z.T @ (classes[:, 1] - p), abs=2e-3)
    assert (classes[:, 1] - p).sum() == pytest.approx(0, abs=1e-3)


def test_labels_are_fitted_one_by_one_and_a_label_never_shown_is_given_to_nobody(recwarn):
    rng = np.random.default_rng(0)
    (x, first), (new, _) = correlated(300), correlated(500, seed=1)
    classes = np.stack([first[:, 0], rng.random(300) < 0.1 + 0.5 * (x[:, 0] > 0), np.zeros(300, bool)], axis=1)
    found = predict(fit_probe(x, classes, "multilabel", 0.1), new, 3)
    for label in (0, 1):
        assert found[:, label] == pytest.approx(exact(x, classes[:, label], 0.1, new)[:, 1], abs=1e-4)
    assert not found[:, 2].any()
    assert not recwarn.list


def test_a_class_that_no_label_shows_has_probability_zero():
    x, classes = correlated(100)
    four = np.concatenate([classes[:, :1], np.zeros((100, 2), bool), classes[:, 1:]], axis=1)
    found = predict(fit_probe(x, four, "ordinal", 0.1), x, 4)
    assert not found[:, 1:3].any()
    assert found[:, [0, 3]] == pytest.approx(predict(fit_probe(x, classes, "binary", 0.1), x, 2))


def many_labels(n, width, seed):
    """Correlated features and eight labels that they tell of, of which one is never and one always shown."""
    x, _ = correlated(n, width=width, seed=seed)
    rng = np.random.default_rng(seed)
    shown = x[:, :8] @ np.random.default_rng(2).normal(size=(8, 6)) + 4 * rng.normal(size=(n, 6)) > 2
    return x, np.hstack([shown, np.zeros((n, 1), bool), np.ones((n, 1), bool)])


TASKS = {
    "binary": lambda seed: correlated(400, 2, seed=seed),
    "multiclass": lambda seed: correlated(400, 4, seed=seed),
    "multilabel": lambda seed: many_labels(600, 96, seed),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("penalty", [0.01, 10.0])
def test_a_probe_fitted_on_a_device_is_scikit_learns(task, penalty, recwarn):
    """The code has no device of its own, so a processor shows what it computes."""
    (x, classes), (new, truth) = (TASKS[task](seed) for seed in (0, 1))
    x, new = np.hstack([x, np.ones((len(x), 1))]), np.hstack([new, np.ones((len(new), 1))])  # one that never varies
    wanted = predict(fit_probe(x, classes, task, penalty), new, classes.shape[1])
    found, weak = (
        predict(GPUProbe(x, classes, task, each, torch.device("cpu")), new, classes.shape[1])
        for each in (penalty, penalty / 10)
    )
    assert found == pytest.approx(wanted, abs=2e-4)
    assert macro_auc(truth, found)[0] == pytest.approx(macro_auc(truth, wanted)[0], abs=1e-4)
    assert not np.allclose(weak, wanted, atol=2e-4)


def test_a_class_that_no_label_shows_has_probability_zero_on_a_device_too():
    x, classes = correlated(100)
    four = np.concatenate([classes[:, :1], np.zeros((100, 2), bool), classes[:, 1:]], axis=1)
    found = predict(GPUProbe(x, four, "ordinal", 0.1, torch.device("cpu")), x, 4)
    assert not found[:, 1:3].any() and np.allclose(found.sum(axis=1), 1)


def test_every_penalty_is_fitted_on_the_device_that_was_asked_for(make_data, monkeypatch):
    data, used = make_data(n=300), []

    class Recorded(GPUProbe):
        def __init__(self, x, classes, task, penalty, device):
            used.append((penalty, device.type))
            super().__init__(x, classes, task, penalty, torch.device("cpu"))

    monkeypatch.setattr(module, "GPUProbe", Recorded)
    monkeypatch.setattr(module, "resolve_device", torch.device)
    features = {s: np.random.default_rng(0).normal(size=(len(data.rows(s)), 5)) for s in ("train", "val", "test")}
    found = linear_evaluation(features, data, data.rows("train"), PLAN, "cuda")
    assert used == [(penalty, "cuda") for penalty in PLAN.penalties]
    wanted = linear_evaluation(features, data, data.rows("train"), PLAN)
    assert len(used) == 5 and found[1] == wanted[1] and np.allclose(found[0], wanted[0], atol=1e-3)


def test_the_penalty_is_the_best_on_validation(make_data):
    data = make_data(n=600)
    rng, rows, val = np.random.default_rng(0), label_subset(data, 0.5, 0), data.labels[data.rows("val")]
    features = {split: 3 * rng.normal(size=(len(data.rows(split)), 30)) for split in ("train", "val")}
    for split, x in features.items():
        x[:, 0] += data.labels[data.rows(split)]
    x = features["train"][np.searchsorted(data.rows("train"), rows)]
    reached = {
        penalty: roc_auc_score(val, exact(x, data.labels[rows], penalty, features["val"])[:, 1])
        for penalty in PLAN.penalties
    }
    p, chosen = linear_evaluation(features | {"test": features["val"]}, data, rows, PLAN)
    assert roc_auc_score(val, p[:, 1]) == pytest.approx(max(reached.values()), abs=1e-3)
    assert reached[chosen] == pytest.approx(max(reached.values()), abs=1e-3)
    assert min(reached.values()) < max(reached.values()) - 0.01


def test_with_one_class_on_validation_the_loss_chooses_and_says_so(make_data, capsys):
    say_once.cache_clear()
    data = make_data(n=600)
    data.labels.flags.writeable = True
    data.labels[data.rows("val")] = 1
    rng = np.random.default_rng(0)
    features = {s: rng.normal(size=(len(data.rows(s)), 3)) + data.labels[data.rows(s), None] for s in ("train", "val")}
    rows = data.rows("train")
    p, chosen = linear_evaluation(features | {"test": features["val"]}, data, rows, PLAN)
    losses = {
        penalty: log_loss(np.ones(len(features["val"])), p, labels=[0, 1])
        for penalty in PLAN.penalties
        for p in [exact(features["train"], data.labels[rows], penalty, features["val"])]
    }
    assert chosen == min(losses, key=losses.get) != PLAN.penalties[0]
    assert log_loss(np.ones(len(p)), p, labels=[0, 1]) == pytest.approx(losses[chosen], abs=1e-4)
    assert "validation split shows one class only" in capsys.readouterr().out


def test_linear_evaluation_predicts_the_test_rows_with_the_chosen_probe(pretrained):
    data, run = pretrained(task="ordinal", n=400)
    features, rows = run_features(run, data)[3], label_subset(data, 0.5, 0)
    probabilities, penalty = linear_evaluation(features, data, rows, PLAN)
    x = features["train"][np.searchsorted(data.rows("train"), rows)]
    assert probabilities == pytest.approx(exact(x, data.labels[rows], penalty, features["test"]), abs=1e-3)
    assert len(probabilities) == len(class_matrix(data, data.rows("test")))
