"""Claims about rows of results: what is in one, and what it is made from."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from mocolayers.data.labels import label_subset, subset_seed
from mocolayers.data.prepared import load
from mocolayers.evaluation import features, finetune
from mocolayers.evaluation import judge as module
from mocolayers.evaluation.features import STAGES, stage_features
from mocolayers.evaluation.judge import fine_tuned, judge, judge_all
from mocolayers.recipe import ARMS, Evaluation, preset
from mocolayers.runtime import DatasetError, RunError
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run

PLAN = Evaluation(fractions=(0.1, 1.0), subsets=2, least_steps=6, batch=16, checks=3, resamples=20)
COLUMNS = {
    "dataset": str,
    "judged_on": str,
    "arm": str,
    "seed": int,
    "fraction": float,
    "subset": int,
    "protocol": str,
    "stage": int,
    "source": str,
    "pool": int,
    "labels": int,
    "labels_read": int,
    "auc": float,
    "low": float,
    "high": float,
    "f1": float,
    "kappa": float,
    "seconds": float,
    "recipe": str,
    "weights": str,
}
ALL_WAYS = [
    {"protocol": "linear"},
    {"protocol": "linear", "stage": 2, "pool": 2},
    {"protocol": "linear", "source": "pixels"},
    {"protocol": "finetune"},
]


def replace_weights(run, value=0.0):
    filled = {name: torch.full_like(tensor, value) for name, tensor in load_file(run.encoder_file).items()}
    save_file(filled, run.encoder_file)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_every_row_has_the_same_typed_columns_made_or_read(pretrained, way):
    data, run = pretrained()
    made, read = judge(run, data, PLAN, 0.1, **way), judge(run, data, PLAN, 0.1, **way)
    for row in (made, read):
        assert {name: type(value) for name, value in row.items()} == COLUMNS
        assert list(row) == list(COLUMNS)
        assert row["judged_on"] == row["dataset"] == data.name and row["weights"] == run.weights_hash
        assert row["low"] <= row["high"] and 0 <= row["auc"] <= 1
    assert json.dumps(made) == json.dumps(read)
    assert {name: made[name] for name in way} == way


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal", "multiclass"])
def test_every_task_is_judged_in_both_protocols_and_reads_all_its_labels(pretrained, task):
    data, run = pretrained(task=task, n=400)
    table = judge_all(run, data, PLAN)
    assert table["protocol"].tolist() == ["linear"] * 3 + ["finetune"] * 2, "two subsets at 10%, one at 100%"
    assert (table["labels_read"] == table["labels"]).all()
    assert (table[table["fraction"] == 1]["labels"] == len(data.rows("train"))).all()
    assert table["kappa"].notna().all() == (task == "ordinal")


@pytest.mark.parametrize("arm", ARMS)
def test_random_is_judged_frozen_supervised_by_training_and_the_rest_both_ways(pretrained, arm):
    data, run = pretrained(arm)
    found = set(judge_all(run, data, PLAN)["protocol"])
    assert found == {"random": {"linear"}, "supervised": {"finetune"}}.get(arm, {"linear", "finetune"})


def test_every_stage_is_probed_on_the_same_label_subsets_and_stage_four_is_linear_evaluation(pretrained):
    data, run = pretrained(task="multilabel")
    table = judge_all(run, data, PLAN, ("linear",), STAGES)
    assert table.groupby("stage").size().tolist() == [3] * 4
    assert (table.groupby(["fraction", "subset"])["labels"].nunique() == 1).all()
    last = table[table["stage"] == 4].reset_index(drop=True)
    pd.testing.assert_frame_equal(last, judge_all(run, data, PLAN, ("linear",)))
    assert table.groupby(["fraction", "subset"])["auc"].nunique().max() > 1
    wider = judge_all(run, data, PLAN, ("linear",), STAGES, pool=2)
    assert not np.array_equal(table["auc"], wider["auc"])


def test_pixels_are_the_same_call_and_need_no_encoder(pretrained, monkeypatch):
    data, run = pretrained("random")
    monkeypatch.setattr(Run, "load_encoder", None)
    row = judge_all(run, data, PLAN, source="pixels").query("fraction == 1").iloc[0]
    # A bright square marks the positive class: pixels tell.
    assert row["auc"] > 0.95 and (row["source"], row["stage"]) == ("pixels", 0)


def test_the_outside_test_equals_a_probe_by_hand(pretrained, make_data):
    data, run = pretrained()
    other = make_data("other", n=600, seed=5)
    row = judge(run, other, PLAN, 0.5, 1)
    assert (row["dataset"], row["judged_on"]) == ("tiny", "other")
    rows = label_subset(other, 0.5, subset_seed(0, 1))
    x, val, test = (
        stage_features(run.load_encoder(), other, part)[3].astype(float)
        for part in (rows, other.rows("val"), other.rows("test"))
    )
    scaler, by_hand = StandardScaler().fit(x), []
    for penalty in PLAN.penalties:
        model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-10)
        model.fit(scaler.transform(x), other.labels[rows])
        aucs = [
            roc_auc_score(other.labels[other.rows(split)], model.predict_proba(scaler.transform(part))[:, 1])
            for split, part in (("val", val), ("test", test))
        ]
        by_hand.append(aucs)
    assert row["auc"] == pytest.approx(max(by_hand, key=lambda aucs: aucs[0])[1], abs=1e-3)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_a_row_is_made_once_and_then_read(pretrained, way, monkeypatch):
    data, run = pretrained()
    first = judge(run, data, PLAN, 0.1, **way)
    for name in ("linear_evaluation", "fine_tune", "label_subset"):
        monkeypatch.setattr(module, name, None)
    assert json.dumps(judge(run, data, PLAN, 0.1, **way)) == json.dumps(first)


@pytest.mark.parametrize("way", [ALL_WAYS[0], ALL_WAYS[1], ALL_WAYS[3]], ids=str)
def test_a_replaced_encoder_is_judged_anew(pretrained, way):
    data, run = pretrained()
    first = judge(run, data, PLAN, 1.0, **way)
    replace_weights(run)
    second = judge(run, data, PLAN, 1.0, **way)
    assert second["auc"] != first["auc"] and second["weights"] != first["weights"]
    assert way["protocol"] == "finetune" or second["auc"] == 0.5, "an encoder of zeros tells nothing"


def test_a_fine_tuned_model_of_a_replaced_encoder_is_trained_anew(pretrained):
    data, run = pretrained()
    before = fine_tuned(run, data, 0.1, 0, PLAN)
    replace_weights(run, 0.01)
    after = fine_tuned(run, data, 0.1, 0, PLAN)
    assert not np.array_equal(before[1], after[1])
    assert not torch.equal(before[0].encoder.conv1.weight, after[0].encoder.conv1.weight)


@pytest.mark.parametrize(
    ("protocol", "change"),
    [("linear", {"penalties": (1e-5,)}), ("finetune", {"lr": 0.1}), ("finetune", {"epochs": 3})],
)
def test_a_row_of_an_edited_plan_is_made_anew(pretrained, protocol, change):
    data, run = pretrained()
    for plan in (PLAN, dataclasses.replace(PLAN, **change)):
        judge(run, data, plan, 1.0, protocol=protocol)
    first, second = (load_file(kept)["probabilities"] for kept in (run.folder / "evaluations").iterdir())
    assert not torch.allclose(first, second, atol=1e-3)


def test_more_fractions_and_subsets_leave_the_rows_that_are_there(pretrained, monkeypatch):
    data, run = pretrained()
    first = judge_all(run, data, PLAN)
    monkeypatch.setattr(module, "patient_bootstrap", None)
    fewer = judge_all(run, data, dataclasses.replace(PLAN, fractions=(0.1,), subsets=1))
    assert set(fewer["auc"]) <= set(first["auc"])


def test_settings_out_of_a_table_find_the_row_that_is_there(pretrained, monkeypatch):
    data, run = pretrained()
    first = judge(run, data, PLAN, 1.0, 0, stage=2)
    monkeypatch.setattr(module, "label_subset", None)
    assert json.dumps(judge(run, data, PLAN, 1, np.int64(0), stage=np.int64(2))) == json.dumps(first)


def test_another_data_set_is_another_row(pretrained, make_data):
    data, run = pretrained()
    first, second = (judge(run, each, PLAN, 0.1) for each in (data, make_data("other", n=300, seed=5)))
    assert first["labels"] != second["labels"]


def test_a_data_set_corrected_by_hand_is_judged_anew(pretrained, tmp_path):
    data, run = pretrained()
    first, path = judge(run, data, PLAN, 1.0), tmp_path / "data" / "tiny" / "labels.npy"
    array = np.load(path)
    path.unlink()  # what is loaded is mapped from it
    np.save(path, np.roll(array, 1, axis=0))
    again = load("tiny", tmp_path / "data")
    assert judge(run, again, PLAN, 1.0)["auc"] != first["auc"]
    assert json.dumps(judge(run, data, PLAN, 1.0)) == json.dumps(first)


def test_the_same_images_under_another_name_are_judged_on_under_that_name(pretrained, tmp_path):
    data, run = pretrained()
    first = judge(run, data, PLAN, 1.0)
    shutil.copytree(tmp_path / "data" / "tiny", tmp_path / "data" / "site_b")
    other = judge(run, load("site_b", tmp_path / "data"), PLAN, 1.0)
    assert json.dumps(other) == json.dumps(first | {"judged_on": "site_b"})


@pytest.mark.parametrize("way", [ALL_WAYS[0], ALL_WAYS[1], ALL_WAYS[3]], ids=str)
def test_the_device_is_the_one_asked_for(pretrained, way, monkeypatch):
    data, run = pretrained()
    for each in (features, finetune):
        monkeypatch.setattr(each, "resolve_device", {"elsewhere": torch.device("meta")}.__getitem__)
    # Nothing that was computed on torch's meta device can come back.
    with pytest.raises(NotImplementedError, match="meta"):
        judge(run, data, PLAN, 0.1, device="elsewhere", **way)
    with pytest.raises(NotImplementedError, match="meta"):
        judge_all(run, data, PLAN, (way["protocol"],), device="elsewhere")


def test_a_kept_classifier_predicts_what_its_row_was_scored_on(pretrained):
    data, run = pretrained(task="multiclass")
    made, probabilities = fine_tuned(run, data, 0.1, 0, PLAN, "cpu")
    read, again = fine_tuned(run, data, 0.1, 0, PLAN, "cpu")
    for model, p in ((made, probabilities), (read, again)):
        assert np.allclose(model.predict(data, data.rows("test")), p, atol=1e-6) and not model.training
    assert probabilities.shape == (len(data.rows("test")), 3)


def test_with_all_labels_another_subset_is_another_training_on_the_same_labels(pretrained):
    data, run = pretrained()
    rows = [judge(run, data, PLAN, 1.0, draw, "finetune") for draw in (0, 1)]
    assert rows[0]["labels"] == rows[1]["labels"] == len(data.rows("train"))
    assert not np.array_equal(*(fine_tuned(run, data, 1.0, draw, PLAN)[1] for draw in (0, 1)))


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def other_byte(place):
    """A function that changes the lowest bit of one byte of a file, as a worn disk does."""

    def change(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return change


def other_number(path):
    path.write_bytes(re.sub(rb'(seed\\+": )0', rb"\g<1>7", path.read_bytes()))


@pytest.mark.parametrize("damage", [cut, foreign, other_number, *map(other_byte, (0.15, 0.3, 0.6, 1.0))])
@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_a_damaged_row_is_made_again_with_a_line(pretrained, capsys, damage, protocol):
    data, run = pretrained()
    good = judge(run, data, PLAN, 0.1, protocol=protocol)
    (kept,) = (run.folder / "evaluations").iterdir()
    before = kept.read_bytes()
    damage(kept)
    assert kept.read_bytes() != before
    again = judge(run, data, PLAN, 0.1, protocol=protocol)
    assert f"{kept.name} is damaged" in capsys.readouterr().out
    assert again | {"seconds": 0} == pytest.approx(good | {"seconds": 0}, nan_ok=True)
    assert judge(run, data, PLAN, 0.1, protocol=protocol) == pytest.approx(again, nan_ok=True)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("card", [{"task": "multiclass"}, {"modality": "retina"}])
def test_the_same_arrays_prepared_as_another_task_or_modality_are_judged_anew(pretrained, card):
    """The fingerprint of the data is that of its arrays; graded labels are also scored by kappa."""
    data, run = pretrained(task="ordinal")
    other = dataclasses.replace(data, card=data.card | card)
    assert other.fingerprint == data.fingerprint
    first, second = (judge(run, each, PLAN, 0.1, protocol="finetune") for each in (data, other))
    assert not np.isnan(first["kappa"])
    assert np.isnan(second["kappa"]) if "task" in card else first["auc"] != second["auc"]


@pytest.mark.parametrize(
    "way",
    [{"protocol": "knn"}, {"source": "text"}, {"stage": 5}, {"protocol": "finetune", "stage": 2}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(pretrained, way):
    data, run = pretrained()
    with pytest.raises(ValueError, match="no such row.*protocol is 'linear'.*'finetune'"):
        judge(run, data, PLAN, 0.1, **way)


def test_an_unfinished_run_cannot_be_judged(make_data, tmp_path):
    data = make_data()
    with pytest.raises(RunError, match="encoder.safetensors does not exist"):
        judge(Run(preset("smoke", "moco", data), tmp_path), data, PLAN, 0.1)


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
@pytest.mark.parametrize("code, name", [(0, "train"), (1, "val"), (2, "test")])
def test_a_data_set_without_a_split_can_be_trained_on_but_not_judged_on(make_data, tmp_path, code, name, protocol):
    data = make_data()
    less = dataclasses.replace(data, split=np.where(data.split == code, 3, data.split))
    recipe = preset("smoke", "moco", data, batch=16, queue=40, steps=2)
    run = pretrain(recipe, less, tmp_path / "runs", progress=False)
    with pytest.raises(DatasetError, match=f"tiny has no {name} images"):
        judge(run, less, PLAN, 0.1, protocol=protocol)
