"""Claims about running the study: the same trials for every arm, no look at the test split, rows that come back."""

import json

import numpy as np
import pandas as pd
import pytest

from study import protocol, report, run
from study.__main__ import main
from study.run import Cell, chosen, grid, in_parallel, judge_cell, run_again, sweep, trials, try_out


@pytest.fixture
def tiny(make_data, tmp_path, monkeypatch):
    """A function that makes the prepared data set "tiny" for every process, and the folder of runs."""
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    return lambda **options: {"data": make_data(**options), "runs_dir": tmp_path / "runs"}


def small(tiny, arms=("moco",), series="first", **options):
    runs_dir = tiny(n=240, **options)["runs_dir"]
    return grid(series, ["tiny"], arms, [0], preset_name="smoke", runs_dir=runs_dir)


def test_every_arm_gets_the_same_trials_in_what_all_arms_share():
    shared = {
        arm: [{k: v for k, v in t.items() if k in protocol.SHARED} for t in trials(arm)] for arm in protocol.TUNED
    }
    assert all(part == shared["moco"] for part in shared.values())
    assert shared["moco"] == trials("moco"), "MoCo has no stage loss to tune"
    assert shared["moco"][0] == {} and len({str(trial) for trial in shared["moco"]}) == protocol.TRIALS


def test_stage_weights_are_drawn_within_their_range_and_reach_the_recipe(make_data):
    data = make_data()
    for arm, (low, high) in protocol.WEIGHTS.items():
        for trial in trials(arm)[1:]:
            assert low <= max(trial["stage_weights"]) <= high
            recipe = Cell("tiny", arm, 3, settings=trial).recipe(data)
            assert list(recipe.stage_weights) == trial["stage_weights"]
            assert (recipe.views.crop, recipe.lr, recipe.precision) == (trial["crop"], trial["lr"], "fp32")


def test_a_series_changes_every_arm_and_leaves_the_untrained_ones_untrained(make_data):
    data = make_data()
    steps = {series: Cell("tiny", "moco", 0, series).recipe(data).steps for series in protocol.SERIES}
    assert steps["long"] == 3 * steps["first"] == steps["larger"]
    assert Cell("tiny", "moco", 0, "larger").recipe(data).stem == "imagenet"
    assert Cell("tiny", "random", 0, "long").recipe(data).steps == 0


def test_a_trial_reads_no_test_image_and_no_test_label(make_data, watched, tmp_path, monkeypatch):
    data = make_data()
    asked, test = watched(data), data.rows("test")
    data.labels[test] = -1  # nothing could be made of such a label
    monkeypatch.setattr(run, "load", lambda name: data)
    row = try_out(Cell("tiny", "moco", protocol.TUNING_SEED, preset_name="smoke", runs_dir=tmp_path), 0)
    read = np.unique(np.concatenate([np.atleast_1d(rows) for rows in asked]))
    assert len(read) and not set(read) & set(test)
    assert 0 <= row["validation_auc"] <= 1


def test_the_choice_is_the_best_mean_over_data_sets(tmp_path):
    names = ["arm", "trial", "dataset", "validation_auc"]
    made = [("moco", 0, "a", 0.9), ("moco", 0, "b", 0.5), ("moco", 1, "a", 0.8), ("moco", 1, "b", 0.8)]
    table = pd.DataFrame(made, columns=names)
    table["changes"] = ["{}" if trial == 0 else '{"lr": 0.5}' for trial in table["trial"]]
    table.to_csv(tmp_path / "tuning.csv", index=False)
    settings = chosen(tmp_path)
    assert settings["moco"] == settings["mse"] == settings["barlow"] == {"lr": 0.5}, "released arms follow MoCo"


def test_a_row_comes_back_from_nothing(tiny, tmp_path):
    cells = small(tiny)
    scores = judge_cell(cells[0])["scores"]
    other = [Cell("tiny", "moco", 0, preset_name="smoke", runs_dir=tmp_path / "elsewhere")]
    twice = run_again(other, 24, scores, processes=1)
    usual = scores[scores["stage"] == 4]
    assert len(twice) == len(usual) and twice["again"].tolist() == twice["auc"].tolist()
    assert len(list((tmp_path / "elsewhere").glob("*/encoder.safetensors"))) == 1, "it was trained again"


def test_a_random_part_is_a_part_and_the_same_every_time(monkeypatch):
    cells, seen, scores = grid("first"), [], report.read("scores")
    monkeypatch.setattr(run, "sweep", lambda cells, *_, **__: seen.append(cells) or {"scores": scores})
    for _ in range(2):
        run_again(cells, 5, scores)
    assert seen[0] == seen[1] and len(seen[0]) == 5 and seen[0] == [cell for cell in cells if cell in seen[0]]


def test_what_the_table_does_not_hold_is_refused_before_it_is_trained(capsys):
    assert typed("again --dataset mine --arm moco --seed 10 --series first") == 1
    assert "no rows of mine moco 10" in capsys.readouterr().err


def typed(line: str, *more) -> int:
    """The exit code of `python -m study LINE`."""
    return main([*line.split(), *map(str, more)])


def test_status_counts_what_is_trained(tiny, tmp_path, capsys):
    cells = small(tiny, ["random", "moco"])
    line = "status --dataset tiny --seed 0 --arm random moco --series first --preset smoke --runs-dir"
    for trained in (0, 1):
        assert typed(line, tmp_path / "runs") == 0
        assert capsys.readouterr().out == f"{trained} of 2 runs are trained\n"
        cells[0].trained()


def fail(number: int) -> int:
    if number == 2:
        raise ValueError("nothing to learn from")
    return number


def test_a_failed_job_ends_the_others_and_is_named():
    with pytest.raises(ValueError, match="nothing to learn") as caught:
        in_parallel(fail, [(n,) for n in range(200)], "jobs", 2)
    assert caught.value.__notes__ == ["in the job 2"]


def test_from_runs_to_sentences(tiny, tmp_path, capsys):
    """Two arms, one data set, one seed, as a user types it: tables, typed, then findings and a figure."""
    tiny(n=240)
    before = protocol.README.read_text(encoding="utf-8")
    out, words = tmp_path / "out", ["--dataset", "tiny", "--seed", "0", "--series", "first", "--preset", "smoke"]
    words += ["--runs-dir", str(tmp_path / "runs"), "--out", str(out)]
    assert main(["run", *words, "--arm", "random", "mse", "--jobs", "1"]) == 0
    scores = report.read("scores", folder=out)
    assert set(scores["arm"]) == {"random", "mse"} and set(scores["judged_on"]) == {"tiny"}
    assert set(scores.loc[scores["source"] == "encoder", "stage"]) == {1, 2, 3, 4}
    assert set(scores.loc[scores["source"] == "pixels", "arm"]) == {"random"}
    for name in ("similarity", "outputs"):
        assert set(report.read(name, "tiny", out)["arm"]) == {"mse"}
    assert main(["run", *words, "--arm", "moco", "mse", "--jobs", "1"]) == 1, "rows of random would be lost"
    assert "choose another --out" in capsys.readouterr().err
    assert main(["run", *words, "--arm", "random", "moco", "mse", "--jobs", "1"]) == 0
    assert main(["report", "--tables", str(out)]) == 0
    assert "mean over tiny" in capsys.readouterr().out and (out / protocol.FIGURE).is_file()
    assert report.main_claim(report.usual(report.read("scores", folder=out)))["seeds"].tolist() == [1, 1]
    assert protocol.README.read_text(encoding="utf-8") == before, "only the committed tables go into the README"


def test_an_arm_of_a_plugin_is_studied_like_any_other(tiny, tmp_path):
    plugin, seen = tmp_path / "mine.py", tmp_path / "loaded"
    plugin.write_text(f"open({str(seen)!r}, 'a').write('x')\n")
    cells = [Cell("tiny", "moco", 0, "long", "smoke", tiny(n=240)["runs_dir"], {"steps": 2}, plugin)]
    assert set(sweep(cells, 1)) == {"scores"}, "a later series has no analyses"
    assert seen.is_file()


@pytest.mark.parametrize("command", ["tune", "run", "again", "as-released"])
def test_nothing_is_written_over_the_committed_tables(command, capsys):
    assert main([command, "--out", str(protocol.TABLES)]) == 1
    assert "committed tables" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["run --settings /no/such/folder", "report --tables /no/such/folder"])
def test_a_folder_that_is_not_there_is_one_line(words, capsys):
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/no/such/folder" in error and "python -m study" in error


def test_help_shows_what_to_type(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for command in ("make study", "tune", "run", "report", "again", "status", "as-released"):
        assert command in said


def test_the_committed_trials_are_as_many_for_every_arm():
    table = report.read("tuning")
    assert set(table["arm"]) == set(protocol.TUNED) and table.groupby("arm").size().nunique() == 1
    assert set(table["changes"]) >= {json.dumps(changes) for changes in chosen(protocol.TABLES).values()}
