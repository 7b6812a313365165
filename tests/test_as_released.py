"""Claims about what the released code does, and about what is told of it."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_arrays, make_card

from mocolayers.data.prepared import load, save_prepared
from mocolayers.data.views import random_view
from mocolayers.notebook.figures import rendered
from mocolayers.notebook.series import HOME
from mocolayers.recipe import EVALUATIONS
from mocolayers.training.pretrain import Trainer
from study import as_released
from study.as_released import (
    BASE,
    MINUS,
    ReleasedTrainer,
    Setting,
    aliased_shuffle,
    control,
    percentile_interval,
    pretrain_as_released,
    probe_auc,
    released_interval,
    released_subset,
    summary,
)

CSV = HOME / "study" / "tables" / "as_released.csv"
CPU = torch.device("cpu")


class Tiny(Setting):
    """A setting whose runs take no time."""

    def recipe(self, arm, **changes):
        return super().recipe(arm, width=4, batch=16, queue=40, steps=20, **changes)


@pytest.fixture
def tiny(make_data, tmp_path):
    return Tiny(make_data(n=480, channels=3, per_patient=4), 0, ("mse",), "smoke", tmp_path / "runs")


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
    first = as_released.released_order(data, seed=3)[: len(rows)]
    assert set(rows) <= set(first)


def test_retina_rows_by_class_leave_one_class_in_the_subset_and_nothing_to_learn(make_data):
    data = make_data(n=600, channels=3)
    data.card["modality"] = "retina"
    rows = released_subset(data, 0.3, seed=0)
    assert set(data.labels[rows]) == {0}
    rng = np.random.default_rng(0)
    features = {s: data.labels[data.rows(s), None] + rng.normal(size=(len(data.rows(s)), 1)) for s in ("train", "test")}
    features["val"] = data.labels[data.rows("val"), None] + 0.0
    plan = EVALUATIONS["smoke"]
    assert probe_auc(features, data, rows, plan) == 0.5
    assert probe_auc(features, data, data.rows("train"), plan) > 0.7


def test_chest_images_have_no_released_subset(make_data):
    assert control(Setting(make_data(), 0), ("E1", "E2")).empty


def test_without_augmentation_an_image_stays_as_it_is():
    x = torch.rand(4, 3, 16, 16)
    assert torch.allclose(random_view(x, as_released.UNTOUCHED, torch.Generator().manual_seed(0)), x, atol=1e-5)


def test_the_released_interval_is_narrower_by_the_root_of_the_number_of_resamples():
    draws = np.random.default_rng(0).normal(size=500)
    ends = [interval(draws) for interval in (percentile_interval, released_interval)]
    sound, released = (high - low for low, high in ends)
    assert sound / released == pytest.approx(500**0.5, rel=0.1)


def test_only_the_percentile_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), {released_interval: 0, percentile_interval: 0}
    for _ in range(200):
        sample = rng.normal(size=60)
        draws = rng.choice(sample, (500, 60)).mean(axis=1)
        for interval in held:
            low, high = interval(draws)
            held[interval] += low < 0 < high
    assert held[percentile_interval] > 180
    assert held[released_interval] < 30


def test_a_gain_that_is_the_start_only_vanishes_with_equal_starts(tiny, monkeypatch):
    aucs = {(BASE, False): 0.70, ("mse", False): 0.70, (BASE, True): 0.75, ("mse", True): 0.75}
    monkeypatch.setattr(Tiny, "run", lambda self, arm, zero_init_residual: (arm, zero_init_residual))
    monkeypatch.setattr(Tiny, "linear_auc", lambda self, run, subsets: aucs[run])
    table = control(tiny, ("O3",))
    table = table[table["quantity"].str.endswith(MINUS)]
    assert table["as_released"].to_numpy() == pytest.approx([0.05, 0.05])
    assert table["sound"].to_numpy() == pytest.approx([0, 0])


def test_released_validation_trains_the_key_encoder_and_fills_the_queue(tiny):
    trainer = ReleasedTrainer(tiny.recipe("mse"), tiny.data, CPU)
    model = trainer.model
    assert int(model.filled) == len(model.queue)
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(len(model.queue)))
    assert int(Trainer(tiny.recipe("mse"), tiny.data, CPU).model.filled) == 0
    trainer.train_step()
    names = ("encoder_q", "encoder_k")
    before = [[p.clone() for p in getattr(model, name).parameters()] for name in names]
    queue, step = model.queue, trainer.step
    assert np.isfinite(trainer.validate())
    same = [
        [torch.equal(*pair) for pair in zip(was, getattr(model, name).parameters(), strict=True)]
        for was, name in zip(before, names, strict=True)
    ]
    assert all(same[0]) and not any(same[1])
    assert not torch.isclose(queue, model.queue).all(dim=1).any(), "96 validation images are more than 40 places"
    assert model.training and trainer.step == step


def test_the_released_checkpoint_is_that_of_the_lowest_validation_loss_and_trained_once(tiny, monkeypatch):
    losses = iter([1.0, 3.0])
    monkeypatch.setattr(ReleasedTrainer, "validate", lambda self: next(losses))
    chosen, last = pretrain_as_released(tiny.recipe(BASE), tiny.data, tiny.runs_dir)
    checked = chosen.history().dropna()
    assert dict(zip(checked["step"], checked["validation"], strict=True)) == {18: 1.0, 20: 3.0}
    weights = [torch.cat([p.flatten() for p in run.load_encoder().parameters()]) for run in (chosen, last)]
    assert not torch.equal(*weights)
    again = pretrain_as_released(tiny.recipe(BASE), tiny.data, tiny.runs_dir)  # would run out of losses
    assert [run.folder for run in again] == [chosen.folder, last.folder]


def test_random_first_keys_make_a_model_that_knows_nothing_look_good(tiny):
    recipe = tiny.recipe(BASE)
    shares = []
    for kind in (ReleasedTrainer, Trainer):
        trainer = kind(recipe, tiny.data, CPU)
        shares.append(as_released.share_of_guessing(pd.DataFrame([as_released._observed(trainer) for _ in range(2)])))
    assert shares[0] < 0.8 * shares[1]


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_the_absolute_bandwidth_calls_unrelated_rows_alike(tiny, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(as_released, "stage_features", lambda *_: list(rng.normal(size=(4, 96, 256))))
    table = control(tiny, ("A1",)).set_index(["arm", "quantity"])
    null = table.loc[(BASE, "CKA with rows permuted, stage 4")]
    assert null["as_released"] > 0.99
    assert abs(null["sound"]) < 0.05


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table of all controls on a tiny data set, one seed."""
    place = tmp_path_factory.mktemp("whole")
    save_prepared(place / "data" / "tiny", make_arrays(n=480, side=12, channels=3), make_card(channels=3))
    return control(Tiny(load("tiny", place / "data"), 0, ("mse",), "smoke", place / "runs"))


def test_every_control_gives_numbers(whole):
    assert list(dict.fromkeys(whole["code"])) == list(as_released.CONTROLS)
    assert np.isfinite(whole[["as_released", "sound"]].to_numpy()).all()
    assert not whole.duplicated(["code", "seed", "arm", "quantity"]).any()


def test_what_is_drawn_is_in_the_table(whole):
    for code, (_, quantity, _) in as_released.SHOWN.items():
        assert quantity in set(whole.loc[whole["code"] == code, "quantity"])


def test_controls_share_the_sound_way(whole):
    sound = whole[(whole["quantity"] == as_released.LINEAR) & (whole["arm"] == BASE)]["sound"]
    chosen = whole[(whole["quantity"] == f"{as_released.LINEAR}, last step") & (whole["arm"] == BASE)]["sound"]
    assert sound.to_numpy() == pytest.approx(chosen.to_numpy())


def test_the_figure_has_a_panel_for_every_code(whole):
    figure = as_released.figure(whole)
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]
    assert [title.split(":")[0] for title in titles] == list(as_released.SHOWN)
    assert rendered(figure)


def made_up(moves, sound=0.002):
    quantity = as_released.LINEAR + MINUS
    about = {"code": "E1", "dataset": "made up", "arm": "mse", "quantity": quantity}
    return pd.DataFrame(
        [about | {"seed": n, "as_released": sound + move, "sound": sound} for n, move in enumerate(moves)]
    )


@pytest.mark.parametrize(
    ("moves", "half", "clear"),
    # Student-t with two degrees of freedom: 4.303 * 0.002 / sqrt(3)
    [([0.010, 0.012, 0.014], 0.005, True), ([-0.01, 0, 0.01], 0.025, False), ([0.01], float("nan"), False)],
)
def test_the_summary_says_how_far_a_quantity_moved(moves, half, clear):
    (row,) = summary(made_up(moves)).itertuples()
    assert row.moved == pytest.approx(np.mean(moves)) and row.soundly == pytest.approx(0.002)
    assert (row.high - row.low) / 2 == pytest.approx(half, abs=5e-4, nan_ok=True)
    assert row.clear == clear


def test_the_committed_table_holds_every_control_and_its_differences_are_differences():
    table = pd.read_csv(CSV, keep_default_na=False)
    assert list(dict.fromkeys(table["code"])) == list(as_released.CONTROLS) == list(as_released.SHOWN)
    assert table.groupby(["code", "dataset"])["seed"].nunique().min() >= 3
    index = ["code", "dataset", "seed", "quantity", "arm"]
    values = table.set_index(index)[["as_released", "sound"]]
    for key in [key for key in values.index if key[3].endswith(MINUS)]:
        base = (*key[:3], key[3].removesuffix(MINUS))
        difference = values.loc[(*base, key[4])] - values.loc[(*base, BASE)]
        assert values.loc[key].to_numpy() == pytest.approx(difference.to_numpy(), abs=2e-5)
