"""Claims about the command line, as a user types it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocolayers.__main__ import main, parse_changes
from mocolayers.runtime import load_plugin

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


def test_an_arm_without_pretraining_is_not_tried(make_data, tmp_path, monkeypatch, capsys):
    make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    assert main(["pretrain", "--dataset", "tiny", "--arm", "random", "--preset", "smoke", "--dry-run"]) == 1
    assert "not pretrained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"), [("seed=3", "--seed 3"), ("dataset=x", "--dataset x"), ("side=64", "prepare")]
)
def test_what_has_an_option_of_its_own_is_not_set(word, said):
    """`--set dataset=x` would put the rows of one data set under the name of another."""
    with pytest.raises(ValueError, match=said):
        parse_changes((word,))


def test_values_are_read_as_python_writes_them():
    words = ("lr=0.03", "standardized=True", "stage_weights=(0.1,0,0,0)", "layout=resnet18")
    found = {"lr": 0.03, "standardized": True, "stage_weights": (0.1, 0, 0, 0), "layout": "resnet18"}
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


def test_a_plugin_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["pretrain", "--plugin", str(tmp_path / "no.py")]) == 1
    assert "CONTRIBUTING.md" in capsys.readouterr().err
