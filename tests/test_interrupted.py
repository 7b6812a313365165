"""Claims about work that is cut off or done twice at once: it goes on to the same end, and no two write one run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pretrain import LONG, SCRIPT, same_weights
from test_series import write_notebook

from mocolayers.recipe import preset
from mocolayers.training import pretrain as module
from mocolayers.training.pretrain import Trainer, pretrain

HOME = Path(__file__).resolve().parents[1]
SERIES = """
import sys
from pathlib import Path
from mocolayers.__main__ import main
from mocolayers.notebook import series
series.NOTEBOOKS = Path(sys.argv[1])
sys.exit(main(["series", "--dataset", "a", "--preset", "smoke", *sys.argv[2:]]))
"""
# A shell in the background has Ctrl-C ignored, and so may these tests.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither SIGKILL nor these locks")


def python(program, *words, **environment):
    command = [sys.executable, "-c", HEARS + program, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, cwd=HOME, **pipes)


@posix
@pytest.mark.parametrize("kind, count", [("pretraining", 3), ("fine_tuning", 3), ("series", 1)])
def test_work_that_is_killed_at_random_moments_goes_on_to_the_same_end(kind, count):
    command = [sys.executable, HOME / "tests" / "killed.py", kind, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert f"{kind}: {count} of {count} ended the same" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_fine_tuning_is_one_line_and_keeps_its_rows(make_data, tmp_path, number):
    make_data()
    words = ["finetune", "--dataset", "tiny", "--preset", "smoke", "--set", "steps=3", "queue=32"]
    words += ["--runs-dir", tmp_path / "runs", "--fraction", *[n / 100 for n in range(10, 100)]]
    program = "import sys\nfrom mocolayers.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    process = python(program, *words, MOCOLAYERS_DATA=str(tmp_path / "data"))
    first = process.stdout.readline()
    process.send_signal(number)
    rest, said = process.communicate()
    assert process.returncode == 128 + number and "AUC" in first
    assert said.splitlines()[-1] == "interrupted; the same command goes on" and "Traceback" not in said
    rows = [path for path in tmp_path.glob("runs/*/evaluations/*") if not path.name.startswith(".")]
    assert 1 <= len(rows) == len([first, *rest.splitlines()]) < 90


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_series_is_one_line_ends_its_kernel_and_goes_on(tmp_path, number):
    started = tmp_path / "started"
    slow = f"import os, time\nfrom pathlib import Path\nagain = Path({str(started)!r}).exists()\n"
    slow += f"Path({str(started)!r}).write_text(str(os.getpid()) + ' ')\ntime.sleep(0 if again else 60)"
    write_notebook(tmp_path / "notebooks", "01_fast", "1 + 1")
    write_notebook(tmp_path / "notebooks", "02_slow", slow)
    words = [tmp_path / "notebooks", "--out", tmp_path / "executed", "--runs-dir", tmp_path / "runs"]
    process = python(SERIES, *words)
    wait_for(lambda: list(tmp_path.glob("executed/*/*/*/01_fast.json")))
    wait_for(lambda: started.exists() and started.read_text().endswith(" "))
    process.send_signal(number)
    _, said = process.communicate()
    assert (process.returncode, said) == (128 + number, "interrupted; the same command goes on\n")
    wait_for(lambda: not alive(int(started.read_text())))
    said, _ = python(SERIES, *words).communicate()
    assert "2 of 2 notebooks done (1 were up to date already)" in said


def wait_for(what, seconds=60):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.05)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def elsewhere(make_data, tmp_path):
    """Data, a recipe, and another process that trains it and is at its third step."""
    data = make_data()
    process = python(SCRIPT, tmp_path / "data", tmp_path / "runs", "mse")
    while int(process.stdout.readline()) < 3:
        assert process.poll() is None
    yield data, preset("smoke", "mse", data, 1, **LONG), process
    process.kill()
    process.communicate()


@posix
def test_a_second_process_waits_and_takes_over_what_the_first_has_trained(elsewhere, tmp_path, capsys, monkeypatch):
    data, recipe, process = elsewhere
    monkeypatch.setattr(Trainer, "train_step", None)
    run = pretrain(recipe, data, tmp_path / "runs", "cpu", progress=False)
    assert run.finished and "already training in another process; waiting for it" in capsys.readouterr().out
    process.communicate()
    assert process.returncode == 0


@posix
def test_when_the_first_process_is_killed_the_one_that_waits_goes_on_from_its_checkpoint(elsewhere, tmp_path, capsys):
    data, recipe, process = elsewhere
    killer = python(
        "import os, signal, sys, time; time.sleep(3); os.kill(int(sys.argv[1]), signal.SIGKILL)", process.pid
    )
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot end before
    run = pretrain(recipe, data, tmp_path / "runs", "cpu", progress=False)
    killer.communicate()
    assert run.finished and "waiting for it" in capsys.readouterr().out
    assert same_weights(run, pretrain(recipe, data, tmp_path / "straight", "cpu", progress=False))


def test_a_run_is_free_again_after_an_error(make_data, tmp_path, monkeypatch, capsys):
    data = make_data()
    recipe = preset("smoke", "moco", data, 1, **LONG)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", lambda *_: exec("raise ValueError('of our own')"))
        with pytest.raises(ValueError, match="of our own"):
            pretrain(recipe, data, tmp_path, "cpu", progress=False)
    assert pretrain(recipe, data, tmp_path, "cpu", progress=False).finished
    assert "waiting" not in capsys.readouterr().out
