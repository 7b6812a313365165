"""Claims about running the study: draws, choices, rows that are kept as they come, and rows that come back."""

import dataclasses

import distributed
import numpy as np
import pandas as pd
import pytest

from mocolayers.data.prepared import PHANTOMS
from study import protocol, report, run
from study.__main__ import main
from study.run import Cell, draw, in_parallel, judge_cell, keep, missing, planned, prepared_sets, run_again, scores_in


@pytest.fixture
def tiny(make_data, tmp_path, monkeypatch):
    """A function that makes the prepared data set "tiny" for every process, and the folder of runs."""
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(protocol.SCALES["smoke"].fields, "stem", "small")  # small images, on which mse pools to 4 x 4
    return lambda **options: {"data": make_data(**options), "runs_dir": tmp_path / "runs"}


def cell(tiny, series="gate", arm="moco", seed=0, **options):
    return Cell(series, "tiny", arm, seed, scale="smoke", runs_dir=tiny(n=240)["runs_dir"], **options)


def row(series, arm, auc, dataset="tiny", seed=100, setting="preset", weight=1.0, pull=0.0):
    """Both protocols with few labels."""
    about = {"series": series, "dataset": dataset, "judged_on": dataset, "setting": setting, "arm": arm, "seed": seed}
    about |= {"scale": "cpu", "weight": weight, "pull": pull, "stage": 4, "source": "encoder", "auc": auc}
    return [about | {"protocol": kind, "fraction": few} for kind in protocol.NAMES for few in protocol.FEW]


def table(*rows):
    return pd.DataFrame([each for four in rows for each in four])


def test_a_draw_moves_whole_patients_and_keeps_the_class_mix(make_data):
    data = make_data(n=600, per_patient=3)
    drawn = [draw(data, seed) for seed in (0, 0, 1)]
    assert (drawn[0].split == drawn[1].split).all() and drawn[0].fingerprint == drawn[1].fingerprint
    assert (drawn[0].split != drawn[2].split).any() and drawn[0].fingerprint != drawn[2].fingerprint
    assert drawn[0].fingerprint != data.fingerprint
    rows = {split: drawn[0].rows(split) for split in ("train", "val", "test")}
    sides = [set(data.patients[part]) for part in rows.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    share = len(rows["test"]) / len(rows["train"])
    assert share == pytest.approx(protocol.RATIO, abs=0.05), "the ratio of the corrected t is that of the draw"
    for part in rows.values():
        assert data.labels[part].mean() == pytest.approx(data.labels.mean(), abs=0.03)


def test_no_choice_sees_an_image_that_a_repetition_tests_on(make_data):
    data = make_data(n=600, per_patient=3)
    tuned = set(np.concatenate([draw(data, seed).rows("test") for seed in protocol.TUNING]))
    tested = set(np.concatenate([draw(data, seed).rows("test") for seed in protocol.REPETITIONS]))
    assert tuned and tested and not tuned & tested
    assert len(tested) > 0.9 * (len(data.labels) - len(tuned)), "over the repetitions every other image is tested"


def test_unlabelled_images_stay_unlabelled_and_their_patients_are_never_judged(make_data):
    data = make_data(n=300, per_patient=3)
    data.split[0:300:9] = 3
    for seed in (0, protocol.TUNING[0]):
        drawn = draw(data, seed)
        assert ((drawn.split == 3) == (data.split == 3)).all()
        judged = data.patients[drawn.rows("val", "test")]
        assert len(judged) and not set(judged) & set(data.patients[data.split == 3])


def test_a_set_that_is_prepared_for_another_task_or_too_small_is_no_set_of_the_study(tiny):
    tiny(name="aptos")
    with pytest.raises(ValueError, match="aptos is prepared with .* for a binary task.*--dataset aptos"):
        prepared_sets("cpu")
    assert prepared_sets("smoke") == ["aptos"]


def test_all_arms_of_a_seed_differ_in_the_arm_alone(make_data):
    data = draw(make_data(channels=3), 0)
    about = {"setting": "weak", "scale": "smoke"}
    moco, mse = (
        dataclasses.asdict(Cell("comparison", "tiny", arm, 0, **about).recipe(data)) for arm in ("moco", "mse")
    )
    assert {name for name in moco if moco[name] != mse[name]} == {"arm", "stage_loss", "stage_weights", "stage_options"}
    assert moco["views"]["hue"] == protocol.WEAK["hue"] and moco["precision"] == "fp32"


def test_a_cell_has_the_steps_the_views_and_the_weights_that_it_names(make_data):
    gray = draw(make_data(), 0)
    base = Cell("weights", "tiny", "mse", 100).recipe(gray)
    harder = Cell("weights", "tiny", "mse", 100, "weak-long", 5.0).recipe(gray)
    assert harder.steps == 2 * base.steps == 3000 and harder.stage_weights == tuple(5 * w for w in base.stage_weights)
    assert harder.views.hue == 0, "gray images have no colour to change"
    released = Cell("conditions", "tiny", "mse", 0, "released").recipe(gray)
    assert (released.head, released.schedule, released.batch, released.bn_splits) == ("linear", "constant", 16, 1)
    assert released.views.released_order and released.views.crop == 1 and released.zero_init_residual
    assert not Cell("conditions", "tiny", "moco", 0, "released").recipe(gray).zero_init_residual
    assert Cell("comparison", "tiny", "random", 0, "weak-long").recipe(gray).steps == 0


def done(cells, auc=lambda cell: 0.7):
    """Rows of cells, as if they had been run."""
    made = [row(c.series, c.arm, auc(c), c.dataset, c.seed, c.setting, c.weight) for c in cells]
    return table(*made)


EMPTY = scores_in(protocol.HOME / "nowhere")
TINY = {"datasets": ["tiny"]}


def whole(series, auc=lambda cell: 0.7):
    """The tables of all that comes before a series and of it."""
    before = list(protocol.SERIES)[: list(protocol.SERIES).index(series) + 1]
    scores = EMPTY
    for name in before:
        while cells := missing(planned(name, scores, **TINY), scores):
            scores = pd.concat([scores, done(cells, auc)]) if len(scores) else done(cells, auc)
    return scores


def test_the_gate_tries_every_candidate_and_repeats_the_best():
    first = planned("gate", EMPTY, **TINY)
    assert {c.setting for c in first if c.arm == "moco"} == set(protocol.CANDIDATES)
    scores = done(first, lambda c: 0.9 if c.setting == "weak-warm" else 0.6)
    later = missing(planned("gate", scores, **TINY), scores)
    assert {(c.arm, c.setting) for c in later} == {
        ("random", "preset"),
        ("supervised", "preset"),
        ("moco", "weak-warm"),
    }
    assert {c.seed for c in later} == {101, 102}


def test_the_comparison_takes_the_best_weights_and_leaves_a_losing_arm_of_our_own_out():
    best = {"mse": 12, "mse-standardized": 3}
    own = "mse-standardized"
    worse = whole("weights", lambda c: 0.6 if c.arm == own else 0.7 + 0.01 * (c.weight == best.get(c.arm)))
    assert own not in {cell.arm for cell in planned("comparison", worse, seeds=[0], **TINY)}
    scores = whole("weights", lambda c: 0.7 + 0.01 * (c.weight == best.get(c.arm)))
    cells = planned("comparison", scores, seeds=[0, 1], **TINY)
    assert len({c.setting for c in cells}) == 1 and [c.seed for c in cells] == sorted(c.seed for c in cells)
    pairs = {(c.arm, c.weight) for c in cells}
    assert {("mse", 1.0), ("mse", 12.0), ("mse-standardized", 3.0), ("random", 1.0), ("barlow", 1.0)} <= pairs
    assert (own, 1.0) not in pairs


def test_no_choice_is_made_from_half_a_series():
    gate, weights = whole("gate"), whole("weights")
    with pytest.raises(ValueError, match="gate is not complete.*--series gate"):
        planned("weights", EMPTY, **TINY)
    with pytest.raises(ValueError, match="gate is not complete"):
        planned("weights", gate[gate["seed"] < 102], **TINY)
    with pytest.raises(ValueError, match="at all its weights.*--series weights"):
        planned("comparison", gate, **TINY)
    with pytest.raises(ValueError, match="at all its weights"):
        planned("comparison", weights[weights["weight"] != 12], **TINY)
    assert planned("comparison", weights, **TINY)


def test_a_loss_of_the_secondary_family_joins_at_its_best_weight_when_its_weights_have_been_tried():
    weights = whole("weights", lambda c: 0.7 + 0.01 * (c.weight == 15))
    without = weights[weights["weight"] != 50]
    both = [{(c.arm, c.weight) for c in planned("comparison", scores, **TINY)} for scores in (weights, without)]
    assert both[0] - both[1] >= {("barlow", 15.0)} and ("barlow", 1.0) in both[1]


def test_rows_of_another_scale_decide_nothing():
    with pytest.raises(ValueError, match="gate is not complete"):
        planned("weights", whole("gate").assign(scale="gpu"), **TINY)


def test_without_data_the_remedy_is_named_and_a_rehearsal_takes_synthetic_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path))
    assert typed(f"run --series gate --out {tmp_path / 'out'}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "PROTOCOL.md" in error and str(tmp_path) in error
    assert {c.dataset for c in planned("gate", EMPTY, scale="smoke")} == set(PHANTOMS)


def test_rows_are_added_and_nothing_is_lost(tmp_path):
    keep({"scores": table(row("gate", "moco", 0.7), row("gate", "random", 0.6))}, tmp_path)
    keep({"scores": table(row("gate", "moco", 0.8), row("weights", "mse", 0.75, weight=5.0))}, tmp_path)
    kept = scores_in(tmp_path)
    assert kept.groupby("arm")["auc"].mean().to_dict() == {"moco": 0.8, "mse": 0.75, "random": 0.6}
    assert len(kept) == 12
    controls = pd.DataFrame({"code": "E1", "judged_on": "tiny", "quantity": "patients", "arm": ["", "mse"], "seed": 0})
    for _ in range(2):  # an empty name comes back from a file as a missing one
        keep({"as_released": controls}, tmp_path)
    assert len(pd.read_csv(tmp_path / "as_released.csv")) == 2
    cells = [Cell("weights", "tiny", "mse", 100, weight=w) for w in (1.0, 5.0)]
    assert missing(cells, kept) == cells[:1]


def test_a_row_comes_back_from_nothing(tiny, tmp_path):
    one = cell(tiny, "comparison")
    scores = judge_cell(one)["scores"]
    other = dataclasses.replace(one, runs_dir=tmp_path / "elsewhere")
    twice = run_again([other], 24, scores, 1)
    assert len(twice) == len(scores) and twice["again"].tolist() == twice["auc"].tolist()
    assert len(list((tmp_path / "elsewhere").glob("*/encoder.safetensors"))) == 1, "it was trained again"
    with pytest.raises(ValueError, match="none of these rows"):
        run_again([dataclasses.replace(one, seed=7)], 24, scores)


def typed(line: str, *more) -> int:
    """The exit code of `python -m study LINE`."""
    return main([*line.split(), *map(str, more)])


def fail(number: int) -> int:
    if number == 2:
        raise ValueError("nothing to learn from")
    return number


def test_a_failed_job_ends_the_others_and_is_named():
    with pytest.raises(ValueError, match="nothing to learn") as caught:
        list(in_parallel(fail, list(range(200)), "jobs", 2))
    assert caught.value.__notes__ == ["in the job 2"]


def test_from_an_empty_folder_to_sentences(tiny, tmp_path, capsys, monkeypatch):
    """A small study as a user types it: it stops where a job fails, goes on from its tables, and says what it found."""
    tiny(n=240)
    before = protocol.README.read_text(encoding="utf-8")
    monkeypatch.setattr(protocol, "CANDIDATES", {"preset": {}, "weak": {"views": protocol.WEAK}})
    monkeypatch.setattr(protocol, "WEIGHTS", {"mse": (5,), "barlow": (1,)})
    monkeypatch.setattr(protocol, "LEADING", ("mse",))
    monkeypatch.setattr(protocol, "EVERYWHERE", (*protocol.UNTRAINED, "moco", "mse"))
    out, words = tmp_path / "out", "--dataset tiny --scale smoke --jobs 1"
    words += f" --runs-dir {tmp_path / 'runs'} --out {tmp_path / 'out'}"
    left = lambda series: len(missing(planned(series, scores_in(out), ["tiny"], scale="smoke"), scores_in(out)))  # noqa: E731
    assert left("gate") == 4
    whole, count = run.judge_cell, []
    monkeypatch.setattr(run, "judge_cell", lambda job: fail(2) if len(count) == 3 else (count.append(1), whole(job))[1])
    assert typed("run --series gate " + words) == 1 and "in the job" in capsys.readouterr().err
    assert left("gate") == 1
    monkeypatch.setattr(run, "judge_cell", whole)
    assert typed("run " + words) == 0
    assert [left(series) for series in protocol.SERIES] == [0] * 4
    capsys.readouterr()
    scores = report.read("scores", folder=out)
    assert set(scores["series"]) == set(protocol.SERIES) and "mse x5" in set(scores["arm"])
    assert set(scores.query("series == 'comparison' and source == 'encoder'")["stage"]) == {1, 2, 3, 4}
    for name in ("similarity", "outputs"):
        assert {"moco", "mse"} <= set(report.read(name, "tiny", out)["arm"])
    assert (scores.groupby(["series", "seed", "protocol", "fraction", "judged_on"])["labels"].nunique() == 1).all()
    assert typed(f"report --out {out}") == 0
    said = capsys.readouterr().out
    for words in (
        "Does MoCo help?",
        "Would another weight or the paper's recipe help?",
        "2 of 2 repetitions",
        "paper's released settings",
    ):
        assert words in said
    assert (out / protocol.FIGURE).is_file()
    assert protocol.README.read_text(encoding="utf-8") == before, "only the committed tables go into the README"


def test_what_is_done_is_told_by_the_scores_which_are_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run, "_keep", lambda rows, file: written.append(file.stem))
    keep({"scores": None, "similarity": None, "outputs": None}, tmp_path)
    assert written[-1] == "scores" and len(written) == 3


PLUGIN = """
from mocolayers.method.losses import StageMSE
from mocolayers.recipe import ARMS


class Mine(StageMSE):
    def forward(self, query, key):
        return [2 * loss for loss in super().forward(query, key)]


ARMS["mine"] = {"stage_loss": Mine, "stage_weights": (0.1,) * 4, "stage_options": {"pool": (1, 1, 1, 1)}}
"""


def test_an_arm_of_a_plugin_is_studied_like_any_other(tiny, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    part = TINY | {"arms": ["mine"], "plugin": plugin}
    weights = planned("weights", whole("gate"), **part)
    assert {(c.arm, c.weight) for c in weights} == {("moco", 1.0), ("mine", 1.0)}
    assert {c.arm for c in planned("comparison", whole("weights"), **part)} == {"mine"}
    scores = judge_cell(cell(tiny, "weights", "mine", plugin=plugin))
    assert set(scores) == {"scores"} and set(scores["scores"]["arm"]) == {"mine"}, "only the comparison is analysed"


def test_an_arm_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no arm is called 'mes'.*plugin"):
        planned("weights", whole("gate"), arms=["mes"], **TINY)


def test_a_random_part_is_a_part_and_the_same_every_time(monkeypatch):
    scores, seen = whole("gate"), []
    cells = planned("gate", scores, **TINY)
    monkeypatch.setattr(
        run, "in_parallel", lambda judge, cells, *_: seen.append(cells) or [{"scores": scores.assign(auc=0.5)}]
    )
    for _ in range(2):
        run_again(cells, 5, scores)
    assert seen[0] == seen[1] and len(seen[0]) == 5 and seen[0] == [c for c in cells if c in seen[0]]


def test_a_folder_that_is_not_there_is_one_line(capsys):
    assert typed("report --out /no/such/folder") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/no/such/folder" in error and "python -m study" in error


def test_help_shows_what_to_type(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for command in ("make study", "run", "report", "again", "as-released"):
        assert command in said


def test_the_scale_for_a_gpu_runs_here_in_tiny(tiny, monkeypatch):
    monkeypatch.setitem(protocol.SCALES["gpu"].fields, "steps", 2)
    monkeypatch.setitem(protocol.SCALES["gpu"].fields, "width", 4)
    plan = dataclasses.replace(protocol.PLAN, subsets=1, penalties=(1.0,), least_steps=1, checks=1)
    monkeypatch.setitem(protocol.SCALES, "gpu", dataclasses.replace(protocol.SCALES["gpu"], plan=plan))
    runs_dir = tiny(n=240, side=64)["runs_dir"]
    scores = judge_cell(Cell("comparison", "tiny", "mse", 0, "weak", 5.0, "gpu", runs_dir))["scores"]
    assert set(scores["protocol"]) == set(protocol.NAMES) and scores["pull"].iloc[0] > 0


def test_a_gpu_has_one_worker_and_a_processor_one_per_core(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "Parallel", lambda count, **_: asked.append(count) or (lambda calls: []))
    for gpu in (True, False):
        monkeypatch.setattr(run.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert list(in_parallel(fail, [], "jobs")) == [] and list(in_parallel(fail, [], "jobs", 3)) == []
    assert asked == [1, 3, -1, 3]


def test_a_dask_cluster_does_the_same_work(tiny, tmp_path):
    job = cell(tiny, changes={"stem": "small"})  # what a fixture changes does not reach other processes
    here = judge_cell(job)["scores"]
    job = dataclasses.replace(job, runs_dir=tmp_path / "elsewhere")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        found = list(in_parallel(judge_cell, [job, job], "gate", scheduler=cluster.scheduler_address))
    pd.testing.assert_frame_equal(found[1]["scores"].drop(columns="seconds"), here.drop(columns="seconds"))
