"""Claims about the command line, as a user types it."""

import os
import subprocess
import sys

import pytest

from mocolayers.__main__ import main


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


def test_an_unknown_arm_lists_the_arms(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--arm", "simclr"])
    assert caught.value.code == 2
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
