"""Claims about the command line, as a user types it."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mocolayers.__main__ import main, parse_changes
from mocolayers.evaluation.judge import judge
from mocolayers.recipe import ARMS, EVALUATIONS
from mocolayers.runtime import RunError, load_plugin
from study.__main__ import main as study
from study.run import keep

HOME = Path(__file__).resolve().parents[1]


def command(*words, data):
    return subprocess.run(
        [sys.executable, "-m", "mocolayers", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"MOCOLAYERS_DATA": str(data)},
    )


@pytest.mark.parametrize("name", ["pretrain", "finetune", "series"])
def test_help_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"python -m mocolayers {name} --" in capsys.readouterr().out


def test_pretrain_then_finetune(make_data, tmp_path):
    make_data()
    about = ["--dataset", "tiny", "--arm", "mse", "--preset", "smoke", "--runs-dir", tmp_path / "runs"]
    done = command("pretrain", *about, "--set", "steps=3", data=tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/encoder.safetensors"))) == 1
    judged = command("finetune", *about, "--set", "steps=3", "--fraction", 0.1, data=tmp_path / "data")
    assert judged.returncode == 0, judged.stderr
    assert "95% interval" in judged.stdout


def test_an_unknown_data_set_is_one_line_and_exit_code_1(tmp_path):
    done = command("pretrain", "--dataset", "nonsense", data=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "nonsense" in done.stderr and "python data_scripts/" in done.stderr


def test_an_unknown_arm_lists_the_arms(make_data, tmp_path, monkeypatch, capsys):
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    assert main(["pretrain", "--dataset", "tiny", "--arm", "simclr"]) == 1
    assert "barlow-conditioned" in capsys.readouterr().err


def test_a_bad_setting_says_how_to_write_it(make_data, tmp_path, monkeypatch, capsys):
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    assert main(["pretrain", "--dataset", "tiny", "--set", "lr"]) == 1
    assert "lr=0.03" in capsys.readouterr().err
    assert main(["pretrain", "--dataset", "tiny", "--set", "rate=1"]) == 1
    assert "temperature" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["seed=3", "dataset=x", "side=64"])
def test_what_has_an_option_of_its_own_or_follows_from_the_data_is_not_set(make_data, tmp_path, monkeypatch, word):
    """`--set dataset=x` would put the rows of one data set under the name of another."""
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    assert main(["pretrain", "--dataset", "tiny", "--runs-dir", str(tmp_path / "runs"), "--set", word]) == 1
    assert not (tmp_path / "runs").exists()


def test_values_are_read_as_python_writes_them():
    words = ("lr=0.03", "standardized=True", "stage_weights=(0.1,0,0,0)", "layout=resnet18", "views={[1]: 2}")
    found = {
        "lr": 0.03,
        "standardized": True,
        "stage_weights": (0.1, 0, 0, 0),
        "layout": "resnet18",
        "views": "{[1]: 2}",
    }
    assert parse_changes(words) == found


def test_the_loss_of_the_contributing_page_trains_and_is_judged(make_data, tmp_path):
    """It is one class and one arm in a file, and nothing in the package knows of it."""
    make_data()
    page = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")
    plugin = tmp_path / "my_loss.py"
    plugin.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], encoding="utf-8")
    about = ["--plugin", plugin, "--arm", "cosine", "--dataset", "tiny", "--preset", "smoke"]
    about += ["--runs-dir", tmp_path / "runs", "--set", "steps=3"]
    trained = command("pretrain", *about, data=tmp_path / "data")
    assert trained.returncode == 0, trained.stderr
    (history,) = (tmp_path / "runs").glob("*/history.csv")
    assert "stage4" in history.read_text().splitlines()[0]
    judged = command("finetune", *about, "--protocol", "linear", "--fraction", 0.1, data=tmp_path / "data")
    assert judged.returncode == 0, judged.stderr
    assert len(list((tmp_path / "runs").glob("*/encoder.safetensors"))) == 1


def test_a_plugin_may_have_the_name_of_a_module(tmp_path):
    import copy

    plugin = tmp_path / "copy.py"
    plugin.write_text("value = 1\n")
    load_plugin(plugin)
    assert sys.modules["copy"] is copy


PLUGIN = """
import torch
from mocolayers.recipe import ARMS

class Mine(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = (1, 1, 1, 1)

    def forward(self, query, key):
        return [(u - v).square().mean() for u, v in zip(query, key)]

ARMS["mine"] = {"stage_loss": Mine, "stage_weights": (0.1,) * 4}
"""
MALFORMED = {
    "no pool": ("self.pool = (1, 1, 1, 1)", "pass", "its pool is None"),
    "a pool of three": ("(1, 1, 1, 1)", "(1, 1, 1)", r"its pool is \(1, 1, 1\)"),
    "three losses": (
        "for u, v in zip(query, key)]",
        "for u, v in zip(query[1:], key[1:])]",
        r"returns \[\(\), \(\), \(\)\]",
    ),
    "a loss per image": (".mean()", ".flatten(1).mean(1)", r"returns \[\(64,\)"),
    "one sum": ("return [", "return query[0].mean()\n        [", "returns Tensor, not four"),
    "numbers": (".mean()", ".mean().item()", r"returns \['float', "),
    "nothing": ("return [", "[", "returns NoneType"),
    "an error of its own": ("super().__init__()", "raise KeyError('gain')", r"cannot be made with.*KeyError: 'gain'"),
    "no super().__init__()": (
        "super().__init__()",
        "self.layer = torch.nn.Linear(1, 1)",
        "cannot be made with.*Module.__init__",
    ),
    "another argument": ("channels)", "channels, gain)", "cannot be made with.*gain"),
    "no module": ("torch.nn.Module", "object", "is no torch.nn.Module"),
    "an unknown field": ('"stage_weights"', '"weights"', "the arm mine sets 'weights'"),
    "an object": ("Mine,", "Mine([1]),", "stage_loss=Mine.*a class in ARMS"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_loss_is_one_line_that_names_the_class_its_file_and_what_is_wanted(
    make_data, tmp_path, monkeypatch, capsys, kind
):
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    monkeypatch.delitem(ARMS, "mine", raising=False)
    good, bad, said = MALFORMED[kind]
    plugin = tmp_path / "my_loss.py"
    assert good in PLUGIN
    plugin.write_text(PLUGIN.replace(good, bad))
    words = ["--plugin", str(plugin), "--arm", "mine", "--dataset", "tiny", "--preset", "smoke", "--set", "steps=3"]
    assert main(["pretrain", *words, "--runs-dir", str(tmp_path / "runs")]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(said, line), line
    if not kind.startswith(("an unknown", "an object")):
        assert f"the stage loss Mine in {plugin}" in line and "CONTRIBUTING.md" in line
    monkeypatch.delitem(ARMS, "mine")


@pytest.mark.parametrize("name", ["", "..", ".", "../data", "a/b"])
def test_a_name_that_is_no_data_set_gets_no_advice_to_rebuild_it(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path))
    assert main(["pretrain", "--dataset", name]) == 1
    assert capsys.readouterr().err.startswith(f"error: {name!r} is no plain name for a data set")


@pytest.mark.parametrize("words", [("--subset", "-1"), ("--fraction", "0.1", "5"), ("--fraction", "nan")])
def test_a_label_subset_that_cannot_be_is_refused_before_the_pretraining(
    make_data, tmp_path, monkeypatch, capsys, words
):
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    assert main(["finetune", "--dataset", "tiny", "--runs-dir", str(tmp_path / "runs"), *words]) == 1
    assert "from 0 up" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("protocol, folder", [("linear", "features"), ("finetune", "evaluations")])
def test_a_disk_that_fills_up_while_judging_is_one_line_that_names_the_file(pretrained, monkeypatch, protocol, folder):
    data, run = pretrained()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mocolayers.runtime.os.replace", full)
    with pytest.raises(
        RunError, match=f"{folder}.*safetensors cannot be written .No space left.*same command"
    ) as caught:
        judge(run, data, EVALUATIONS["smoke"], 0.1, protocol=protocol)
    assert "\n" not in str(caught.value) and not list((run.folder / folder).iterdir())


JUNK = {"text": b"hello,world\n1,2\n", "bytes": bytes(range(128, 256)), "nothing": b"", "cut": b"arm,trial,validat"}


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize("words", ["report", "run"])
def test_a_damaged_table_of_the_study_is_one_line_with_its_remedy(tmp_path, capsys, kind, words):
    file = tmp_path / "scores.csv"
    file.write_bytes(JUNK[kind])
    more = [] if words == "report" else ["--scale", "smoke"]
    assert study([words, "--out", str(tmp_path), *more]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"error: {file} is damaged" in said and "make it again: python -m study" in said
    assert file.read_bytes() == JUNK[kind] and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_no_process_at_all_is_refused(capsys):
    assert study(["run", "--jobs", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --jobs 0: give how many")


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="out cannot be written"):
        keep({"scores": pd.DataFrame({"arm": ["moco"]})}, tmp_path / "out")
