"""Claims about what a data script may write or remove: nothing that is there already, whoever else is at work."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_arrays, make_card
from test_data_scripts import nih_tree, noise, run_script, save

from mocolayers.data.folders import check_name
from mocolayers.data.prepared import SCRIPTS, load, save_prepared
from mocolayers.runtime import DatasetError


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def scans(tmp_path):
    """Class folders with a reader's notes beside them."""
    for number in range(24):
        save(tmp_path / "scans" / "ab"[number % 2] / f"{number}.png", noise())
    (tmp_path / "scans" / "notes.txt").write_text("years of work")
    return tmp_path / "scans"


def refuses(name, before, *words):
    """The script ends with one line before it reads an image, and no file is changed."""
    kept = contents(before)
    done = run_script(name, "--side", 16, *words)
    assert done.returncode == 1 and "image/s" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert contents(before) == kept
    return done.stderr


@pytest.mark.parametrize("source, out", [("scans", "."), ("scans/a", "."), ("scans", "scans"), (".", "data")])
def test_a_source_and_a_target_that_hold_one_another_are_refused(scans, source, out):
    root = scans.parent
    said = refuses("folder", root, "--source", root / source, "--out", root / out, "--name", "scans")
    assert "one is inside the other" in said


def test_a_link_to_the_source_does_not_hide_it(scans):
    (scans.parent / "link").symlink_to(scans)
    said = refuses("folder", scans.parent, "--source", scans.parent / "link", "--out", scans.parent, "--name", "scans")
    assert "one is inside the other" in said


@pytest.mark.parametrize("script", ["folder", "medmnist_sets", "phantoms"])
def test_a_place_where_nothing_can_be_written_is_said_before_anything_is_read_or_drawn(scans, script):
    (scans.parent / "file").write_text("mine")
    words = ["breastmnist", "--allow-unverified"] if script == "medmnist_sets" else ["--name", "chest_phantom"]
    words += ["--source", scans / "notes.txt"] if script == "medmnist_sets" else []
    words += ["--source", scans, "--workers", "1"] if script == "folder" else []
    for out in (scans.parent / "file", scans.parent / "file" / "below", *[Path("/proc/x")] * Path("/proc").is_dir()):
        command = [sys.executable, SCRIPTS / f"{script}.py", "--out", out, *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"error: {out} cannot be written" in done.stderr and "choose a folder" in done.stderr


def test_raw_nih_images_where_the_data_set_goes_are_kept(tmp_path):
    nih_tree(tmp_path / "data" / "nih", range(1, 7))
    said = refuses("nih", tmp_path, "--source", tmp_path / "data/nih", "--out", tmp_path / "data")
    assert "one is inside the other" in said


@pytest.mark.parametrize("name", ["", ".", "..", "../thesis", "a/b", "*", ".hidden", "a\\b", "a\n", " ", "C:"])
def test_only_a_plain_name_is_a_name(name):
    with pytest.raises(DatasetError, match="no plain name"):
        check_name(name)


@pytest.mark.parametrize("name", ["", "../thesis"])
@pytest.mark.parametrize("script", ["folder", "nih", "breast_histology", "retina", "medmnist_sets"])
def test_every_script_asks_for_a_plain_name_before_it_reads(scans, script, name):
    words = ["pneumoniamnist"] if script == "medmnist_sets" else []
    said = refuses(script, scans.parent, *words, "--source", scans, "--out", scans.parent / "out", "--name", name)
    assert "no plain name" in said


def test_names_that_people_use_are_accepted(tmp_path):
    for name in ("scans", "nih_28", "Köpfe 2024", "a.b-c (2)"):
        assert load(save_prepared(tmp_path / name, make_arrays(), make_card()).name, tmp_path).name == name


@pytest.mark.parametrize("kind", ["file", "link", "empty", "full", "prepared"])
def test_whatever_is_there_is_left_as_it_is(scans, kind):
    target = scans.parent / "out" / "mine"
    target.parent.mkdir()
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(scans.parent / "elsewhere")
    elif kind == "prepared":
        save_prepared(target, make_arrays(), make_card())
    else:
        save(target / "figure.png", noise()) if kind == "full" else target.mkdir()
    said = refuses("folder", scans.parent, "--source", scans, "--out", target.parent, "--name", "mine")
    assert f"{target} is there already and is left as it is" in said and "another name" in said
    with pytest.raises(DatasetError, match="is there already"):
        save_prepared(target, make_arrays(seed=1), make_card())


def test_phantoms_too_ask_before_they_draw(tmp_path):
    (tmp_path / "retina_phantom").mkdir()
    (tmp_path / "retina_phantom" / "mine.txt").write_text("mine")
    command = [sys.executable, str(SCRIPTS / "phantoms.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "retina_phantom is there already" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["retina_phantom"]


KILLED = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
from conftest import make_arrays, make_card
from mocolayers.data.prepared import save_prepared
first = pathlib.Path.rename
def rename(self, to):
    if {before}:
        os.kill(os.getpid(), 9)
    first(self, to)
    if {after}:
        os.kill(os.getpid(), 9)
pathlib.Path.rename = rename
save_prepared(pathlib.Path({target!r}), make_arrays(seed=1), make_card())
"""


def killed_while_saving(target, before="False", after="False"):
    tests = os.path.dirname(__file__)
    code = KILLED.format(tests=tests, target=str(target), before=before, after=after)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_named_and_nothing_is_removed(tmp_path, capsys):
    target = tmp_path / "tiny"
    killed_while_saving(target, before="'.partial-' in str(self)")
    (left,) = tmp_path.iterdir()
    (tmp_path / ".tiny2.partial-01").mkdir()
    before = contents(tmp_path)
    save_prepared(target, make_arrays(), make_card())
    assert before.items() <= contents(tmp_path).items()
    assert f"note: {left}: unfinished" in capsys.readouterr().out


def test_work_of_another_call_is_named_and_kept_when_the_data_set_is_done(scans, tmp_path):
    words = ["--source", scans, "--out", tmp_path / "out", "--name", "own", "--side", "16"]
    work = tmp_path / "out" / ".own.work-0123"
    work.mkdir(parents=True)
    (work / "images.npy").write_text("of a conversion that was stopped, or is running")
    done = run_script("folder", *words)
    assert done.returncode == 0 and f"note: {work}: unfinished" in done.stdout, done.stderr
    assert [path.name for path in work.iterdir()] == ["images.npy"]
    assert sorted(path.name for path in work.parent.iterdir()) == [work.name, "own"]
    again = run_script("folder", *words)
    assert again.returncode == 1 and f"note: {work}: unfinished" in again.stdout


def save_and_load(root, start, said):
    start.wait()
    try:
        with contextlib.suppress(DatasetError):  # another process was faster
            save_prepared(root / "tiny", make_arrays(n=60), make_card())
        said.put(load("tiny", root).fingerprint)
    except Exception as error:
        said.put(repr(error))


def test_processes_that_prepare_one_set_at_once_all_end_well(tmp_path):
    context = multiprocessing.get_context("fork")
    for number in range(10):
        root, start, said = tmp_path / str(number), context.Barrier(8), context.Queue()
        processes = [context.Process(target=save_and_load, args=(root, start, said)) for _ in range(8)]
        for process in processes:
            process.start()
        results = {said.get(timeout=60) for _ in processes}
        for process in processes:
            process.join()
        assert results == {load("tiny", root, verify=True).fingerprint}
        assert [path.name for path in root.iterdir()] == ["tiny"]


def test_two_scripts_at_once_do_not_read_into_one_folder(scans, tmp_path):
    words = ["--source", scans, "--out", tmp_path / "out", "--name", "own", "--side", "16"]
    command = [sys.executable, str(SCRIPTS / "folder.py"), *map(str, words), "--workers", "1"]
    save(scans / "a" / "slow.png", noise(4000, 4000))
    slow = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".own.work-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    (work,) = (tmp_path / "out").glob(".own.work-*")
    slow.send_signal(signal.SIGSTOP)
    second = run_script("folder", *words)
    slow.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "another process" in second.stderr
    assert slow.wait() == 0 and not work.exists()
    assert len(np.load(tmp_path / "out/own/images.npy")) == 25
