"""What the labs compute, against closed forms where they exist; and how their panel answers."""

import json
import re
import signal
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from ipywidgets import FloatSlider, SelectionSlider
from matplotlib.figure import Figure

from mocolayers.data.prepared import SCRIPTS
from mocolayers.evaluation.distributions import ks_distance
from mocolayers.evaluation.features import stage_features
from mocolayers.evaluation.scores import macro_auc
from mocolayers.evaluation.similarity import cka
from mocolayers.labs import distributions, labels, losses, panel, queue, similarity, training, views
from mocolayers.labs.panel import Lab
from mocolayers.notebook.figures import rendered
from mocolayers.recipe import EVALUATIONS, Views, preset
from mocolayers.training.pretrain import pretrain
from mocolayers.training.runs import Run

sys.path.insert(0, str(SCRIPTS))
import phantoms  # noqa: E402

OFF = Views(brightness=0, contrast=0, saturation=0, hue=0, jitter=0, gray=0, blur=0)


@pytest.fixture
def echo():
    """A lab with one slider that says its value, remembers what it was asked, and fails at 3."""

    def answer(x):
        lab.asked.append(x)
        if x == 3:
            raise ValueError("three is <not> allowed")
        return Figure(figsize=(1, 1)), f"picture of {x:g}", {"x": f"{x:g}"}

    lab = Lab({"x": FloatSlider(1, min=0, max=9, step=1)}, answer, "which?")
    lab.asked = []
    return lab


# the panel


def test_a_moved_slider_is_answered(echo):
    echo.controls["x"].value = 5
    assert "<b>5</b>" in echo.view.value and "alt='picture of 5'" in echo.view.value


def test_a_slider_is_followed_while_it_moves_only_if_answers_are_quick(echo, monkeypatch):
    assert echo.controls["x"].continuous_update is False  # before the first answer
    echo.update()
    assert echo.controls["x"].continuous_update is True
    monkeypatch.setattr(panel, "FOLLOW_SECONDS", 0)
    echo.update()
    assert echo.controls["x"].continuous_update is False


def test_what_does_nothing_is_greyed_and_what_is_seldom_used_is_folded():
    sliders = {f"s{n}": FloatSlider(0, min=0, max=1) for n in range(panel.IN_VIEW + 2)}
    answer = lambda **_: (Figure(figsize=(1, 1)), "", {})  # noqa: E731
    lab = Lab(sliders, answer, idle=lambda s0, **_: {"s1"} if s0 else {"s2"})
    assert [name for name, slider in sliders.items() if slider.disabled] == ["s2"]
    sliders["s0"].value = 1
    assert [name for name, slider in sliders.items() if slider.disabled] == ["s1"]
    _, first, more, *_ = lab.box.children
    assert len(first.children) == panel.IN_VIEW and more.selected_index is None
    assert more.children[0].children == tuple(sliders.values())[panel.IN_VIEW :]


def test_an_error_is_shown_in_the_lab_and_the_next_request_recovers(echo):
    echo.controls["x"].value = 3
    assert "three is &lt;not&gt; allowed" in echo.view.value and "role='alert'" in echo.view.value
    echo.controls["x"].value = 4
    assert "<b>4</b>" in echo.view.value


def test_without_a_front_end_a_picture_with_alt_text_is_shown(echo, monkeypatch):
    shown = []
    monkeypatch.setattr(panel, "display", lambda bundle, **options: shown.append((bundle, options)))
    for name in panel.FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MOCOLAYERS_LABS", raising=False)
    echo.show()
    bundle, options = shown.pop()
    assert bundle["image/png"] and panel.WIDGET_TYPE not in bundle
    assert options["metadata"]["image/png"]["alt"] == "picture of 1"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    echo.show()
    assert panel.WIDGET_TYPE in shown.pop()[0]
    monkeypatch.setenv("MOCOLAYERS_LABS", "static")
    echo.show()
    assert panel.WIDGET_TYPE not in shown.pop()[0]


def test_a_page_without_a_kernel_can_leaf_through_prepared_answers(monkeypatch):
    shown = []
    monkeypatch.setattr(panel, "display", lambda bundle, **options: shown.append(bundle))
    monkeypatch.setenv("MOCOLAYERS_LABS", "static")
    answer = lambda x, share: (Figure(figsize=(1, 1)), f"picture of {x:g}", {"x": f"</script>{x:g}"})  # noqa: E731
    share = SelectionSlider(options=[("1%", 0.01), ("all", 1.0)], description="labels")
    controls = {"x": FloatSlider(1, min=0, max=9, description="the x"), "share": share}
    lab = Lab(controls, answer, frames=[{"x": 2.5}, {"x": 3, "share": 1.0}])
    lab.show()
    page = shown.pop()["text/html"]
    pages = json.loads(re.search(r"pages = (\[.*\]), slider", page)[1])
    assert [(p["text"], p["alt"]) for p in pages] == [
        ("the x: 1, labels: 1%", "picture of 1"),
        ("the x: 2.5", "picture of 2.5"),
        ("the x: 3, labels: all", "picture of 3"),
    ]
    assert [p["words"] for p in pages] == ["x: </script>1", "x: </script>2.5", "x: </script>3"]
    assert page.count("</script>") == 1 and "<img alt='picture of 1'" in page
    lab.frames = ()
    lab.show()
    assert "text/html" not in shown.pop()


# view lab


@pytest.fixture(scope="module")
def findings():
    """Findings of two phantoms at 48 px, with detectors that saw seven other images each."""

    def pairs(name, finding):
        return [[phantoms.draw(name, 0, p, 0, f, 48, 0) for f in (finding, 0)] for p in (*range(7), 21)]

    return {name: views.learn_finding(pairs(f"{name}_phantom", f)) for name, f in (("chest", 1), ("retina", 3))}


def mean_scores(findings, **changes) -> list:
    seen = views.compute(findings, replace(OFF, **changes), draw=0)
    return [float(np.mean(seen[name]["scores"])) for name in findings]


def test_a_mark_is_where_the_finding_was_drawn():
    without = np.full((48, 48, 1), 90, np.uint8)
    image = without.copy()
    image[10:20, 30:36] += 80
    mark = views.mark_of(image, without, 1)
    assert mark[10:20, 30:36].all() and mark.sum() < 2 * 60


def test_with_every_slider_at_zero_a_view_and_its_mark_are_those_of_the_image(findings):
    seen = views.compute(findings, OFF, draw=0)
    for name, finding in findings.items():
        assert np.abs(seen[name]["views"].astype(int) - finding.image).max() <= 1
        assert (seen[name]["marks"] == finding.mark).all()


def test_a_mark_moves_with_its_image(findings):
    mirrored = views.compute(findings, replace(OFF, hflip=1, blur=1, jitter=1, brightness=0.3), draw=0)
    for name, finding in findings.items():
        assert (mirrored[name]["marks"] == finding.mark[:, ::-1]).all()


def test_the_detector_finds_what_it_never_saw_and_a_blur_takes_the_small_lesions_first(findings):
    chest, retina = mean_scores(findings)
    assert chest > 0.8 and retina > 0.8
    blurred_chest, blurred_retina = mean_scores(findings, blur=1, sigma=(2.0, 2.001))
    assert retina - blurred_retina > 0.1 > chest - blurred_chest
    dark = mean_scores(findings, jitter=1, brightness=0.3)
    assert np.allclose(dark, [chest, retina], atol=0.05)


def test_a_view_without_its_finding_has_no_score_and_is_counted(findings):
    finding = findings["chest"]
    sheet, inside = np.stack([finding.image] * 2), np.ones((2, 48, 48), bool)
    marks = np.stack([finding.mark, np.zeros_like(finding.mark)])
    assert len(views.score(finding.detector, sheet, marks, inside)) == 1
    assert views.verdict([0.7], 0.9) == "0.70 on the views, the finding is lost in 3 of 4 views, 0.90 on the image"
    assert views.verdict([], 0.9) == "the finding is lost in 4 of 4 views, 0.90 on the image"


def test_the_marks_are_shown_only_when_asked_for(findings):
    lab = views.view_lab(findings)
    plain, marked = (lab.answer(**lab.values() | {"marked": m})[0].axes[0].images[0].get_array() for m in (False, True))
    line = (marked == views.MARK).all(axis=2)
    assert line.any() and not (plain == views.MARK).all(axis=2).any()
    assert (plain[~line] == marked[~line]).all()


# queue lab


@pytest.fixture
def keys():
    """A hundred random directions whose keys never age, and whose queries are their keys."""
    z = np.random.default_rng(0).normal(size=(100, 64))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    age, classes = np.arange(8, -1, -4), np.arange(100)[:, None] % 2 == np.arange(2)
    history = {m: np.stack([z] * 3) for m in queue.MOMENTA}
    return {"q": z, "keys": history, "age": age, "classes": classes}


def test_at_a_high_temperature_the_loss_is_that_of_guessing(keys):
    game = queue.compute(keys, 0.9, 64, temperature=1e4, drop_same=False)
    assert abs(game["loss"] - np.log(65)) < 1e-2
    assert abs(game["false_mass"] - game["same"].mean()) < 1e-2


def test_a_query_equal_to_its_key_finds_it_and_the_loss_vanishes_when_cold(keys):
    game = queue.compute(keys, 0.9, 64, temperature=0.01, drop_same=False)
    assert game["found"] == 1
    assert game["loss"] < 1e-3


def test_guessing_costs_what_the_keys_that_are_left_make_it_cost(keys):
    every, some = (queue.compute(keys, 0.9, 64, 0.1, drop) for drop in (False, True))
    assert np.isclose(every["guess"], np.log(65))
    assert np.isclose(some["guess"], np.mean([np.log(1 + (~same).sum()) for same in some["same"]]))


def test_false_negatives_can_be_left_out(keys):
    game = queue.compute(keys, 0.9, 64, 0.1, drop_same=True)
    assert game["false_mass"] == 0
    assert np.isneginf(game["logits"][:, 1:][game["same"]]).all()
    assert game["loss"] < queue.compute(keys, 0.9, 64, 0.1, drop_same=False)["loss"]


def test_key_history_follows_a_real_training(make_data):
    data = make_data()
    recipe = preset("smoke", "moco", data, batch=16, queue=40)
    history = queue.key_history(recipe, data, "cpu", steps=6, every=2, images=20)
    assert history["age"].tolist() == [4, 2, 0]
    assert all(z.shape == (3, 20, 128) for z in history["keys"].values())
    # The slower the key encoder, the less its keys have moved since the first moment.
    moved = [np.linalg.norm(history["keys"][m][-1] - history["keys"][m][0]) for m in (0.0, 0.9, 0.999)]
    assert moved[0] > moved[1] > moved[2]
    lab = queue.queue_lab(history)
    lab.update()
    assert lab.view.value.count("<img") == 1


# loss lab


@pytest.fixture
def stages(pretrained):
    data, run = pretrained("moco")
    return losses.stages_of(run.load_encoder(), data, run.recipe)


SETTING = {"weights": (1.0,) * 4, "gain": 1.0, "width": 128, "off_diagonal": 1.0, "stage": 4}


def test_o1_a_tenth_of_the_scale_is_a_hundredth_of_the_raw_mse_and_nothing_to_the_scale_free(stages):
    full, tenth = (
        losses.compute(stages, "raw MSE", similarity=0.5, batch=64, **SETTING | {"gain": g}) for g in (1, 0.1)
    )
    assert np.allclose(full["terms"], 100 * tenth["terms"], rtol=1e-4)
    full, tenth = (
        losses.compute(stages, "scale-free MSE", similarity=0.5, batch=64, **SETTING | {"gain": g}) for g in (1, 0.1)
    )
    assert np.allclose(full["terms"], tenth["terms"], rtol=1e-4)


def test_o2_identical_views_pay_the_rank_floor_when_the_projector_is_wider_than_the_batch(stages):
    found = losses.compute(stages, "Barlow", similarity=1.0, batch=16, **SETTING)
    assert (found["terms"] * 32 >= 0.99 * losses.rank_floor(128, 16)).all()
    assert np.allclose(found["terms"], found["floor"], rtol=1e-4)
    unrelated = losses.compute(stages, "Barlow", similarity=0.0, batch=16, **SETTING)
    assert found["terms"].sum() > 0.5 * unrelated["terms"].sum()


def test_o2_with_an_ideal_projector_agreement_saves_almost_nothing_at_a_small_batch(stages):
    for batch, blind in ((16, True), (256, False)):
        setting = SETTING | {"width": 512 if blind else 32}
        same, other = (
            losses.compute(stages, losses.IDEAL, similarity=s, batch=batch, **setting)["terms"] for s in (1.0, 0.0)
        )
        floor = losses.rank_floor(setting["width"], batch) / 32
        assert same[0] >= 0.99 * floor
        assert (same[0] > 0.9 * other[0]) == blind


def test_a_small_off_diagonal_weight_makes_agreement_count(stages):
    setting = SETTING | {"width": 16, "off_diagonal": 0.001}
    same, other = (
        losses.compute(stages, "Barlow", similarity=s, batch=128, **setting)["terms"].sum() for s in (1.0, 0.0)
    )
    assert same < 0.2 * other


def test_the_similarity_slider_is_a_correlation(stages):
    z = [v.mean(dim=(2, 3)) for v in losses.second_view(stages, 0.7, 128)]
    u = [s[:128].mean(dim=(2, 3)) for s in stages["query"]]
    for a, b, w in zip(u, z, stages["stranger"], strict=True):
        a, b, w = (x - x.mean(dim=0) for x in (a, b, w[:128].mean(dim=(2, 3))))
        # v = 0.7 u + sqrt(1 - 0.7^2) w, whose covariance with u follows term by term
        expected = 0.7 * (a * a).mean(0) + (1 - 0.49) ** 0.5 * (a * w).mean(0)
        assert torch.allclose((a * b).mean(0), expected, rtol=1e-3, atol=1e-6)


def test_a_weight_of_zero_leaves_the_gradient_to_info_nce(stages):
    found = losses.compute(stages, "raw MSE", similarity=0.5, batch=64, **SETTING | {"weights": (0.0, 0.0, 0.0, 1e9)})
    assert np.allclose(found["shares"][:3], 0)
    assert found["shares"][3] > 0.99


def test_the_loss_lab_answers_every_loss(stages):
    lab = losses.loss_lab(stages)
    for name in losses.LOSSES:
        lab.controls["loss"].value = name
        lab.update()
        assert lab.view.value.count("<img") == 1, lab.view.value
    assert "floor by rank" in lab.view.value


# label lab


def test_label_lab_scores_are_those_of_linear_evaluation(pretrained):
    data, run = pretrained("moco", n=600)
    plan = EVALUATIONS["smoke"]
    encoder = run.load_encoder()
    features = {split: stage_features(encoder, data, data.rows(split))[3] for split in ("train", "val", "test")}
    draws = labels.label_draws(features, data, plan, seeds=2)
    shown = labels.compute(draws, data, 0.1, 1)
    assert shown["low"] <= shown["auc"] <= shown["high"]
    assert len(shown["spread"]) == 2 and shown["auc"] in shown["spread"]
    [(false, true)] = shown["roc"].values()
    assert abs(np.trapezoid(true, false) - shown["auc"]) < 1e-9  # binary: the area under the curve is the AUC
    assert set(draws[0.1, 1]["rows"]) <= set(draws[0.3, 1]["rows"])
    lab = labels.label_lab(draws, data)
    lab.update()
    assert lab.view.value.count("<img") == 1
    for values in extremes(lab):
        assert_readable(*lab.answer(**values)[::2])
    assert not lab.controls["seed"].disabled
    lab.controls["fraction"].value = 1.0
    assert lab.controls["seed"].disabled  # all labels are one subset


# CKA lab


def test_a_narrow_bandwidth_makes_any_two_sets_alike_and_a_wide_one_tells_the_linear_value():
    x, y = np.random.default_rng(0).normal(size=(2, 200, 32))
    narrow = similarity.compute(x, y, sigma=0.1, rows=200)
    assert min(narrow["usual"]) > 0.999  # the null too
    assert np.allclose(narrow["kernels"][0], np.eye(similarity.SHOWN), atol=1e-6)
    wide = similarity.compute(x, x + y, sigma=1e3, rows=200)
    assert abs(wide["debiased"][0] - cka(x, x + y)) < 1e-3
    assert abs(wide["debiased"][1]) < 0.1


def test_the_cka_lab_uses_no_more_rows_than_there_are():
    x = np.random.default_rng(0).normal(size=(90, 8))
    lab = similarity.similarity_lab({"itself": (x, x)})
    lab.update()
    assert "CKA, debiased</td><td><b>1.000" in lab.view.value


# KS lab


def test_the_largest_gap_is_the_distance_and_the_threshold_reads_off_both_curves():
    p, q = np.random.default_rng(0).random((2, 80))
    truth = np.arange(80) % 2 == 0
    first, second, both = (np.stack([1 - z, z], axis=1) for z in (p, q, truth.astype(float)))
    gap = distributions.compute(first, second, both.astype(bool), "binary", 1, threshold=0.3)
    assert np.isclose(gap["distance"], ks_distance(p, q)[0])
    assert np.isclose(abs(np.mean(p <= gap["where"]) - np.mean(q <= gap["where"])), gap["distance"])
    assert gap["at"] == [np.mean(p <= 0.3), np.mean(q <= 0.3)]


def test_test_images_of_one_kind_have_no_auc_and_one_class_is_no_choice():
    p = np.random.default_rng(0).random((2, 60))
    first, second = (np.stack([1 - z, z], axis=1) for z in p)
    truth = np.stack([np.zeros(60, bool), np.ones(60, bool)], axis=1)
    lab = distributions.distribution_lab({"a pair": (first, second)}, truth, "binary", {"pneumonia": 1})
    assert lab.controls["column"].disabled and not lab.controls["rows"].disabled
    assert "not defined" in lab.answer(**lab.values())[2]["AUC of both models"]


def test_outputs_handed_to_wrong_images_leave_the_distance_and_lose_the_auc():
    truth = np.arange(200) % 2
    p = 0.5 * truth + 0.5 * np.random.default_rng(0).random(200)
    first, both = np.stack([1 - p, p], axis=1), np.stack([truth == 0, truth == 1], axis=1)
    gap = distributions.compute(first, first, both, "binary", 1, 0.5, shuffle=True)
    assert gap["distance"] == 0
    assert gap["auc"][1] == macro_auc(both, first)[0] > 0.9 > gap["auc"][0]


# every lab at its extremes


def extremes(lab):
    """Values of the controls: the given ones, and each control at its ends, alone and together."""
    ends = {}
    for name, control in lab.controls.items():
        if hasattr(control, "options"):
            values = [option[1] if isinstance(option, tuple) else option for option in control.options]
            ends[name] = values[0], values[-1]
        elif hasattr(control, "base"):
            ends[name] = control.base**control.min, control.base**control.max
        else:
            ends[name] = (control.min, control.max) if hasattr(control, "min") else (False, True)
    values = lab.values()
    yield from (values | {name: end} for name, both in ends.items() for end in both)
    yield from ({name: both[side] for name, both in ends.items()} for side in (0, 1))


def assert_readable(figure, numbers):
    assert not re.search(r"\b(nan|inf)\b", " ".join(numbers.values()))
    rendered(figure)  # now every text has its place
    for axis in figure.axes:
        for text in (axis._left_title, axis.xaxis.label, axis.yaxis.label):
            place = text.get_window_extent()
            if text.get_text():
                assert place.x0 >= -1 and place.x1 <= figure.bbox.x1 + 1, text
                assert place.y0 >= -1 and place.y1 <= figure.bbox.y1 + 1, text
    places = [axis._left_title.get_window_extent() for axis in figure.axes if axis.get_title("left")]
    assert all(one.x1 <= other.x0 for one, other in pairwise(places))


def test_no_lab_says_nan_or_loses_a_title_at_any_extreme(findings, keys, stages):
    x, y = np.random.default_rng(0).normal(size=(2, 90, 8))
    p = np.random.default_rng(1).random((2, 60))
    truth = np.arange(60) % 2 == 0
    outputs = {"a pair": tuple(np.stack([1 - z, z], axis=1) for z in p)}
    every = [
        views.view_lab(findings),
        queue.queue_lab(keys),
        losses.loss_lab(stages),
        similarity.similarity_lab({"itself": (x, y)}),
        distributions.distribution_lab(outputs, np.stack([truth, ~truth], axis=1), "binary", {"pneumonia": 1}),
    ]
    for lab in every:
        frames = [lab.values() | changes for changes in lab.frames]
        for values in [*extremes(lab), *frames]:
            figure, _, numbers = lab.answer(**values)
            assert_readable(figure, numbers)


# a watched training


@pytest.fixture
def small(make_data):
    """A data set, and a function that makes a small recipe of an arm on it."""
    data = make_data()
    return data, lambda arm, **changes: preset("smoke", arm, data, batch=16, queue=40, **{"log_every": 2} | changes)


def test_watching_pauses_to_a_checkpoint_and_goes_on_to_the_same_weights(small, tmp_path, monkeypatch):
    data, recipe_of = small
    seen = []
    monkeypatch.setattr(training.DisplayHandle, "update", lambda self, picture: seen.append(picture))
    recipe = recipe_of("mse", steps=30, monitor_every=100)
    original, before = training.Trainer.train_step, signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped_at_7(trainer):
        if trainer.step == 7:
            signal.raise_signal(signal.SIGINT)  # as the stop button does
        return original(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Trainer, "train_step", stopped_at_7)
        training.watch(recipe, data, tmp_path / "runs", "cpu")
    signal.signal(signal.SIGINT, before)  # a shell in the background has it ignored
    assert len(seen) == 1 and "mse: step 3 of 30" in seen[0].alt
    run = Run(recipe, tmp_path / "runs")
    assert run.checkpoint_file.is_file() and not run.finished
    moco = pretrain(recipe_of("moco", steps=30), data, tmp_path / "runs", "cpu", progress=False)
    run = training.watch(recipe, data, tmp_path / "runs", "cpu", {"moco": moco.history()})
    assert "mse: step 30 of 30" in seen[-1].alt and "moco" in seen[-1].alt
    straight = pretrain(recipe, data, tmp_path / "straight", "cpu", progress=False)
    ours, theirs = (done.load_encoder().state_dict() for done in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
