"""Claims about tuning: the same budget for every arm, and no look at the test split."""

import numpy as np
import pandas as pd
import pytest
import torch

from mocolayers.notebook.series import HOME
from mocolayers.recipe import OWN_ARMS, PRETRAINED_ARMS
from mocolayers.training.pretrain import Trainer
from study import report, tuning
from study import run as sweep

FOLDER = HOME / "study" / "tables"


def test_every_arm_gets_the_same_trials_in_what_all_arms_share():
    trials = {arm: tuning.draw_trials(arm) for arm in tuning.TUNED}
    shared = {arm: [{k: v for k, v in t.items() if k in tuning.SHARED} for t in part] for arm, part in trials.items()}
    assert all(part == shared["moco"] for part in shared.values())
    assert len(shared["moco"]) == tuning.TRIALS and shared["moco"][0] == {}
    assert len({str(trial) for trial in shared["moco"]}) == tuning.TRIALS, "no trial twice"


def test_only_arms_with_a_stage_loss_draw_weights():
    assert all("stage_weights" not in trial for trial in tuning.draw_trials("moco"))
    for arm, (low, high) in tuning.WEIGHTS.items():
        for trial in tuning.draw_trials(arm)[1:]:
            assert low <= max(trial["stage_weights"]) <= high


def test_the_tuner_reads_no_test_image(make_data, watched, tmp_path, monkeypatch):
    data = make_data()
    asked = watched(data)
    monkeypatch.setattr(tuning, "load", lambda name: data)
    row = tuning.try_out("tiny", "moco", 0, "smoke", str(tmp_path))
    read = np.unique(np.concatenate([np.atleast_1d(rows) for rows in asked]))
    assert len(read) and not set(read) & set(data.rows("test"))
    assert 0 <= row["validation_auc"] <= 1


def test_without_its_test_split_a_data_set_trains_the_same(make_data):
    data = make_data()
    less = tuning.without_test(data)
    assert not len(less.rows("test")) and len(less.rows("val")) == len(data.rows("val"))
    full, part = (Trainer(tuning.changed("smoke", "moco", d, 0, {}), d, torch.device("cpu")) for d in (data, less))
    assert np.array_equal(data.images[full.batch_rows(0)], less.images[part.batch_rows(0)])


def test_the_choice_is_the_best_mean_over_data_sets():
    rows = [("moco", 0, "a", 0.9), ("moco", 0, "b", 0.5), ("moco", 1, "a", 0.8), ("moco", 1, "b", 0.8)]
    table = pd.DataFrame(rows, columns=["arm", "trial", "dataset", "validation_auc"])
    table["changes"] = ["{}" if trial == 0 else '{"lr": 0.5}' for trial in table["trial"]]
    settings = tuning.choose(table)
    assert settings["moco"] == {"lr": 0.5}
    assert settings["mse"] == settings["barlow"] == {"lr": 0.5}, "as released arms follow MoCo"


def test_changes_reach_the_recipe_and_the_precision_is_fixed(make_data):
    recipe = tuning.changed("lesson", "mse-normalized", make_data(), 3, {"crop": 0.7, "stage_weights": [0, 0, 1, 1]})
    assert (recipe.views.crop, recipe.stage_weights, recipe.precision) == (0.7, (0, 0, 1, 1), "fp32")


@pytest.mark.skipif(not (FOLDER / "tuning.csv").is_file(), reason="results/tuning.csv is not there yet")
def test_the_committed_choice_follows_from_the_committed_trials():
    trials = pd.read_csv(FOLDER / "tuning.csv")
    assert tuning.choose(trials) == tuning.read_settings(FOLDER)
    assert trials.groupby("arm").size().nunique() == 1, "as many trials for every arm"


def test_status_counts_what_is_trained(make_data, tmp_path, monkeypatch):
    data = make_data()
    monkeypatch.setattr(sweep, "load", lambda name: data)
    cells = sweep.grid(["tiny"], ["random"], [0, 1], preset_name="smoke", runs_dir=tmp_path / "runs")
    assert "0 of 2 runs" in sweep.status(cells)
    cells[1].trained()
    assert "1 of 2 runs" in sweep.status(cells)


def test_the_analyses_of_a_small_sweep_stand_beside_its_rows(make_data, tmp_path, monkeypatch):
    make_data(n=240)
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    arms = ["random", "moco"]
    cells = sweep.grid(["tiny"], arms, [0, 1], preset_name="smoke", runs_dir=tmp_path / "runs")
    tables = sweep.sweep(cells, jobs=2)
    assert set(tables["low_label"]["arm"]) == set(arms)
    assert set(tables["probing"]["arm"]) == {"random", "moco", "pixels"}
    for name in ("similarity", "outputs", "outputs_summary"):
        assert set(tables[name]["arm"]) == {"moco"}
    assert tables["outputs_summary"]["models"].nunique() == 4


@pytest.mark.parametrize(
    ("low", "high", "asked", "said"),
    [
        (0.01, 0.2, {"claimed": 0.05}, 0),
        (-0.2, -0.01, {"claimed": 0.05}, 1),
        (-0.01, 0.04, {"claimed": 0.05}, 2),
        (-0.01, 0.06, {"claimed": 0.05}, 3),
        (-0.01, 0.04, {}, 3),
        (-0.005, 0.01, {"better": -0.01}, 0),
    ],
)
def test_an_interval_is_read_by_the_protocol(low, high, asked, said):
    assert report.verdict(low, high, **asked) == report.VERDICTS[said]


@pytest.mark.parametrize(
    ("linear", "finetune", "said"),
    [
        ("supported", "supported", "replicated"),
        ("supported", "opposite", "mixed"),
        ("not supported here", "opposite", "not replicated at this scale"),
        ("not supported here", "cannot tell", "undecided"),
    ],
)
def test_the_claim_as_a_whole_is_read_by_the_protocol(linear, finetune, said):
    arm = PRETRAINED_ARMS[1]
    table = pd.DataFrame({"arm": [arm, arm], "mode": ["linear", "finetune"], "verdict": [linear, finetune]})
    assert report.claim_as_a_whole(table) == said


def test_an_arm_of_our_own_cannot_replicate_the_papers_claim():
    own = pd.DataFrame({"arm": list(OWN_ARMS), "mode": "linear", "verdict": "supported"})
    theirs = pd.DataFrame({"arm": ["mse"], "mode": ["linear"], "verdict": ["opposite"]})
    assert report.claim_as_a_whole(pd.concat([own, theirs])) == "not replicated at this scale"
