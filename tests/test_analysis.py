"""Claims about the analyses of finished runs."""

import numpy as np
import pandas as pd
import pytest
import torch

from mocolayers.evaluation import judge as analysis
from mocolayers.evaluation.distributions import compare_outputs, ks_by_class, output_distances
from mocolayers.evaluation.features import encode, kept_stage_features, pixel_features, stage_features
from mocolayers.evaluation.judge import evaluate, fine_tuned, probe_pixels, probe_stages
from mocolayers.evaluation.scores import calibration_error, reliability
from mocolayers.evaluation.similarity import cka, feature_reuse, similarity_matrix, weights_moved
from mocolayers.recipe import Evaluation
from study.run import judge

PLAN = Evaluation(fractions=(0.1, 1.0), subsets=2, steps=6, batch=16, check_every=2, resamples=20)


def test_global_averages_of_stage_four_are_the_embedding(pretrained):
    data, run = pretrained()
    encoder, rows = run.load_encoder(), data.rows("test")
    features = stage_features(encoder, data, rows)
    assert [f.shape[1] for f in features] == encoder.stage_channels
    assert np.array_equal(features[3], encode(encoder, data, rows))


def test_spatial_pooling_keeps_places_apart(pretrained):
    data, run = pretrained()
    encoder, rows = run.load_encoder(), data.rows("test")
    whole, places = stage_features(encoder, data, rows), stage_features(encoder, data, rows, pool=2)
    for one, four in zip(whole, places, strict=True):
        assert four.shape[1] == 4 * one.shape[1]
        assert four.reshape(*one.shape, 4).mean(axis=2) == pytest.approx(one, abs=1e-5)


def test_features_are_encoded_once_per_encoder(pretrained, monkeypatch):
    data, run = pretrained()
    first = kept_stage_features(run, data)
    monkeypatch.setattr(analysis, "stage_features", None)
    again = kept_stage_features(run, data)
    for stage in range(4):
        for split in ("train", "val", "test"):
            assert np.array_equal(first[stage][split], again[stage][split])


def test_features_of_changed_data_are_not_taken_for_the_old_ones(pretrained, make_data):
    data, run = pretrained()
    before = kept_stage_features(run, data)[3]["test"]
    other = make_data("other", seed=1)
    assert not np.array_equal(kept_stage_features(run, other)[3]["test"], before)


@pytest.mark.parametrize("first", ["probe", "judge"])
def test_the_probe_of_stage_four_is_the_linear_evaluation(pretrained, first):
    data, run = pretrained(task="multilabel")
    if first == "judge":
        judged = pd.DataFrame(judge(run, data, PLAN, modes=["linear"]))
    probed = probe_stages(run, data, PLAN)
    if first == "probe":
        for kept in (run.folder / "evaluations").iterdir():
            kept.unlink()
        judged = pd.DataFrame(judge(run, data, PLAN, modes=["linear"]))
    last = probed[probed["stage"] == 4].reset_index(drop=True)
    for column in ("fraction", "subset", "labels", "auc", "low", "high"):
        assert np.array_equal(last[column], judged[column])


def test_every_stage_is_probed_on_the_same_label_subsets(pretrained):
    data, run = pretrained()
    table = probe_stages(run, data, PLAN, pool=2)
    assert sorted(table["stage"].unique()) == [1, 2, 3, 4]
    assert (table.groupby(["fraction", "subset"])["labels"].nunique() == 1).all()
    assert table.groupby("stage").size().tolist() == [3] * 4
    assert not np.array_equal(table["auc"], probe_stages(run, data, PLAN)["auc"])


def test_pixels_are_probed_as_they_are_or_averaged_when_large(make_data, pretrained):
    small, large = make_data("small"), make_data("large", side=56)
    found = pixel_features(small)["test"]
    assert np.allclose(found, small.images[small.rows("test")].reshape(len(found), -1) / 255)
    assert pixel_features(large)["test"].shape[1] == 28 * 28
    table = probe_pixels(pretrained("random")[1], small, PLAN)
    assert set(table["arm"]) == {"pixels"}
    # A bright square marks the positive class: pixels tell.
    assert table.query("fraction == 1")["auc"].item() > 0.95


def test_features_of_an_encoder_that_did_not_move_are_fully_reused(pretrained, monkeypatch):
    data, run = pretrained()
    unmoved = [run.load_encoder(), run.load_encoder()]
    same = [type("Model", (), {"encoder": encoder}) for encoder in unmoved]
    monkeypatch.setattr(analysis, "fine_tuned", lambda *_: (same[_[3]], None))
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


def test_a_similarity_matrix_is_one_where_the_features_are_the_same():
    features = list(np.random.default_rng(0).normal(size=(3, 50, 6)))
    matrix = similarity_matrix(features, features)
    assert np.diag(matrix) == pytest.approx(np.ones(3))
    assert matrix == pytest.approx(matrix.T)


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
    models = [fine_tuned(run, data, 1.0, draw, PLAN) for draw in (0, 1)]
    rows = [evaluate(run, data, "finetune", 1.0, draw, PLAN) for draw in (0, 1)]
    assert rows[0]["labels"] == rows[1]["labels"] == len(data.rows("train"))
    assert not np.array_equal(models[0][1], models[1][1])
    assert table["floor"][0] == pytest.approx(ks_by_class(models[0][1], models[1][1], data.task)[0, 0])


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
    monkeypatch.setattr(analysis, "fine_tuned", lambda *a: (None, constant if a[2] < 1 else p))
    data.labels.flags.writeable = True
    data.labels[data.rows("test"), 2] = 0
    notes = output_distances(run, data, PLAN, 0.1)["note"].tolist()
    assert notes[0] == ""
    assert notes[1] == "the model with few labels says the same of every image"
    assert notes[2] == "the test split has one kind of image only"


def test_a_diverged_model_is_named():
    p = np.full((5, 2), 0.5)
    with pytest.raises(ValueError, match="the model with few labels hold 10 NaN"):
        compare_outputs(p * np.nan, p, p, "binary")


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


def test_a_kept_result_whose_weights_were_deleted_is_made_again(pretrained):
    data, run = pretrained()
    before = fine_tuned(run, data, 0.1, 0, PLAN)[1]
    for weights in (run.folder / "evaluations").glob("*.safetensors"):
        weights.unlink()
    assert np.array_equal(fine_tuned(run, data, 0.1, 0, PLAN)[1], before)
