"""Claims about what the released code does, and about what is told of it."""

import numpy as np
import pandas as pd
import pytest
from conftest import make_arrays, make_card

from mocolayers.data.prepared import save_prepared
from mocolayers.notebook.figures import rendered
from mocolayers.recipe import EVALUATIONS
from study import as_released, figures, report
from study.as_released import BASE, LINEAR, MINUS, Setting, aliased_shuffle, moved, released_subset
from study.run import Cell

SMALL = {"stem": "small", "width": 4, "batch": 16, "queue": 40, "steps": 20}


def setting(place, **options):
    """A setting on a tiny data set whose runs take no time."""
    channels = options.get("channels", 3)
    save_prepared(
        place / "data" / "tiny", make_arrays(**{"n": 416, "channels": 3} | options), make_card("binary", channels)
    )
    return Setting(Cell("conditions", "tiny", BASE, 0, scale="smoke", runs_dir=place / "runs", changes=SMALL))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    return setting(tmp_path, per_patient=4)


def test_a_shuffled_tensor_loses_half_of_its_values_and_mixes_nothing():
    found = aliased_shuffle(2000, seed=0)
    assert 0.45 < len(np.unique(found)) / 2000 < 0.55
    for k in (20, 200, 1000):
        assert found[:k].max() < k, "the first places hold first rows only"
    proper = np.random.default_rng(0).permutation(2000)
    assert len(np.unique(proper)) == 2000 and proper[:20].max() > 1000


def test_the_released_subset_is_a_few_patients_with_duplicates(make_data):
    data = make_data(n=2000, channels=3, per_patient=40)
    rows = released_subset(data, 0.05, seed=3)
    assert len(rows) == len(data.rows("train")) * 0.05
    assert len(np.unique(rows)) < 0.7 * len(rows)
    assert len(np.unique(data.patients[rows])) <= 3
    again = released_subset(data, 0.05, seed=3)
    assert rows.tolist() == again.tolist()


def test_retina_rows_by_class_leave_one_class_in_the_subset_and_nothing_to_learn(make_data):
    data = make_data(n=600, channels=3)
    data.card["modality"] = "retina"
    rows = released_subset(data, 0.3, seed=0)
    assert set(data.labels[rows]) == {0}
    rng = np.random.default_rng(0)
    features = {s: data.labels[data.rows(s), None] + rng.normal(size=(len(data.rows(s)), 1)) for s in ("train", "test")}
    features["val"] = data.labels[data.rows("val"), None] + 0.0
    plan = EVALUATIONS["smoke"]
    assert as_released.probe_auc(features, data, rows, plan) == 0.5
    assert as_released.probe_auc(features, data, data.rows("train"), plan) > 0.7


def test_chest_images_have_no_released_subset(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    chest = setting(tmp_path, channels=1)
    assert not list(as_released.label_draw(chest))


def test_the_released_interval_of_one_auc_is_narrower_by_the_root_of_the_number_of_resamples():
    draws = np.random.default_rng(0).normal(size=500)
    (low, high), (first, last) = as_released.released_interval(draws), np.percentile(draws, [2.5, 97.5])
    assert (last - first) / (high - low) == pytest.approx(500**0.5, rel=0.1)


def test_over_fourteen_classes_that_differ_it_comes_out_about_right_by_accident():
    rng = np.random.default_rng(0)
    classes = rng.normal(0.75, 0.1, 14)  # a spread of class AUCs such as NIH's
    draws = classes + rng.normal(0, 0.01, (500, 14)) + rng.normal(0, 0.004, (500, 1))  # (R, classes)
    low, high = as_released.released_interval(draws)
    first, last = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    assert 0.5 < (high - low) / (last - first) < 2


def test_the_released_interval_holds_the_truth_far_less_often_than_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        sample = rng.normal(size=60)
        low, high = as_released.released_interval(rng.choice(sample, (500, 60)).mean(axis=1))
        held += low < 0 < high
    assert held < 30


def test_a_gain_that_is_the_start_only_vanishes_with_equal_starts(tiny, monkeypatch):
    aucs = {(BASE, False): 0.70, ("mse", False): 0.70, ("mse", True): 0.75}
    monkeypatch.setattr(Setting, "run", lambda self, arm, zero_init_residual: (arm, zero_init_residual))
    monkeypatch.setattr(Setting, "linear_auc", lambda self, run, subsets: aucs[run])
    (row,) = [row for row in as_released.unequal_starts(tiny) if row["quantity"].endswith(MINUS)]
    assert (row["as_released"], row["sound"]) == pytest.approx((0.05, 0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table of all controls on a tiny data set, one seed."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOCOLAYERS_DATA", str(place / "data"))
        return as_released.control(setting(place, side=12))


def test_every_control_gives_numbers_and_differences_are_differences(whole):
    assert list(dict.fromkeys(whole["code"])) == list(as_released.CONTROLS)
    assert np.isfinite(whole[["as_released", "sound"]].to_numpy()).all()
    values = whole.set_index(["code", "quantity", "arm"])[["as_released", "sound"]]
    assert values.index.is_unique
    for code, quantity, arm in [key for key in values.index if key[1].endswith(MINUS)]:
        both = [values.loc[(code, quantity.removesuffix(MINUS), name)] for name in (arm, BASE)]
        assert values.loc[(code, quantity, arm)].to_numpy() == pytest.approx((both[0] - both[1]).to_numpy())


def test_controls_share_the_sound_way(whole):
    names = (LINEAR, as_released.STARTS)
    sound = whole[whole["quantity"].isin(names) & (whole["arm"] == BASE)]["sound"]
    assert len(sound) == 2 and sound.nunique() == 1


def test_the_figure_has_a_line_for_every_property_and_arm(whole):
    table = pd.concat([whole, whole.assign(seed=1)])
    for unit, codes in (("AUC", ["E1", "O3"]), ("share", ["E4"])):
        figure = figures.released(moved(table), unit)
        assert [label.get_text().split(":")[0] for label in figure.axes[0].get_yticklabels()] == codes
        assert rendered(figure)


@pytest.mark.parametrize(
    ("moves", "half"),
    # Student-t with two degrees of freedom, corrected: 4.303 * 0.002 * sqrt(1/3 + 2/7)
    [([0.010, 0.012, 0.014], 0.0068), ([-0.01, 0, 0.01], 0.0339), ([0.01], float("nan"))],
)
def test_it_is_said_how_far_a_quantity_moved(moves, half):
    about = {"code": "E1", "property": "made up", "judged_on": "a", "quantity": LINEAR, "arm": "mse", "sound": 0.002}
    table = pd.DataFrame([about | {"seed": seed, "as_released": 0.002 + move} for seed, move in enumerate(moves)])
    (row,) = moved(table).itertuples()
    assert row.difference == pytest.approx(np.mean(moves)) and row.sound == pytest.approx(0.002)
    assert (row.high - row.low) / 2 == pytest.approx(half, abs=5e-4, nan_ok=True)


def test_the_committed_table_holds_every_control_over_seeds():
    table = report.read("as_released")
    assert set(table["code"]) == set(as_released.CONTROLS)
    assert table.groupby(["code", "judged_on"])["seed"].nunique().min() >= 3
