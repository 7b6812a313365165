"""The notebook series in batch: the whole grid, only what changed, on past a failure, and an index that tells."""

import errno
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from mocolayers.notebook import series
from mocolayers.runtime import DatasetError, RunError

DATASETS, PRESET, SEED = ["first_set", "second_set"], "smoke", 3
PARAMETERS = 'DATASET = ""\nPRESET = ""\nSEED = 0\nDEVICE = ""\nRUNS_DIR = ""'
ARRIVED = 'import sys\nprint(DATASET, PRESET, SEED, DEVICE, RUNS_DIR, sys.prefix, sep="\\n")'
BROKEN = 'raise ValueError("too few patients <3\\nand a second line")'


def write_notebook(folder: Path, name: str, *sources: str) -> Path:
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [parameters, *map(nbformat.v4.new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def printed(executed: Path) -> str:
    cells = nbformat.read(executed, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def run(home: Path, datasets: list[str], prefixes: tuple[str, ...] = (), **options) -> list[dict]:
    places = {"runs_dir": home / "runs", "out": home / "executed"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series, "NOTEBOOKS", home / "notebooks")
        return list(series.executed(datasets, [PRESET], [SEED], prefixes, **places | options))


def place(home: Path, dataset: str) -> Path:
    return home / "executed" / dataset / PRESET / f"seed{SEED}"


def as_command(home: Path, monkeypatch, **options) -> int:
    """What `python -m mocolayers series` calls, with the notebooks of `home`."""
    monkeypatch.setattr(series, "NOTEBOOKS", home / "notebooks")
    fixed = {"preset": [PRESET], "seed": [SEED], "runs_dir": home / "runs", "out": home / "executed", "jobs": 1}
    return series.run_series(**fixed | options)


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    """A copy of the package to take fingerprints of, so that a file saved meanwhile in the editor upsets no test."""
    copy = tmp_path_factory.mktemp("module") / "mocolayers"
    shutil.copytree(series.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series, "PACKAGE", copy)
        yield copy


@pytest.fixture(scope="module")
def executed(package, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Two data sets by three notebooks, the middle one broken, executed once; tests only read it."""
    home = tmp_path_factory.mktemp("series")
    write_notebook(home / "notebooks", "01_parameters", ARRIVED)
    write_notebook(home / "notebooks", "02_broken", 'print("so far so good")', BROKEN)
    write_notebook(home / "notebooks", "03_memory", "held = bytearray(300 << 20)\nimport time\ntime.sleep(1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOCOLAYERS_DATA", str(home / "data"))
        patch.chdir(home)
        return home, run(home, DATASETS, runs_dir=Path("runs"))


@pytest.fixture
def home(executed, tmp_path, monkeypatch) -> Path:
    """What `executed` left behind, to change at will; RUNS_DIR stays the same, for it is a parameter."""
    copy = tmp_path / "copy"
    shutil.copytree(executed[0], copy)
    monkeypatch.setenv("MOCOLAYERS_DATA", str(copy / "data"))
    return copy


@pytest.fixture
def same_runs(executed) -> dict:
    return {"runs_dir": executed[0] / "runs"}


def test_the_grid_goes_on_after_a_broken_notebook(executed):
    home, cells = executed
    ways = [("01_parameters", "done"), ("02_broken", "failed"), ("03_memory", "done")]
    assert [(cell["dataset"], cell["notebook"], cell["status"]) for cell in cells] == [
        (dataset, *way) for dataset in DATASETS for way in ways
    ]
    for dataset in DATASETS:
        assert (place(home, dataset) / "03_memory.ipynb").is_file()


def test_parameters_reach_the_notebook_the_runs_folder_as_an_absolute_path(executed):
    home, _ = executed
    for dataset in DATASETS:
        lines = printed(place(home, dataset) / "01_parameters.ipynb").splitlines()
        assert lines[:5] == [dataset, PRESET, str(SEED), "auto", str(home / "runs")]


def test_notebooks_run_in_the_interpreter_that_started_the_series(executed):
    home, _ = executed
    assert printed(place(home, DATASETS[0]) / "01_parameters.ipynb").splitlines()[5] == sys.prefix


def test_a_failure_gives_the_first_line_of_its_error_and_is_kept_as_far_as_it_came(executed):
    home, cells = executed
    assert cells[1]["error"] == "ValueError: too few patients <3"
    folder = place(home, DATASETS[0])
    assert printed(folder / "02_broken.failed.ipynb") == "so far so good\n"
    assert not (folder / "02_broken.ipynb").exists()
    assert not (folder / "02_broken.html").exists()
    assert not list(home.rglob("*.partial.ipynb"))


def test_peak_memory_and_time_are_those_of_the_kernel(executed):
    _, cells = executed
    light, _, heavy = cells[:3]
    assert heavy["megabytes"] >= 300
    assert heavy["megabytes"] - light["megabytes"] == pytest.approx(300, abs=60)
    assert 1 < heavy["seconds"] < 120


class Page(HTMLParser):
    """Rows of a table: their text, their class, their links."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append({"class": dict(attributes).get("class"), "text": [], "links": []})
        if tag == "a":
            self.rows[-1]["links"].append(dict(attributes)["href"])

    def handle_data(self, text):
        if self.rows and text.strip():
            self.rows[-1]["text"].append(text.strip())


def test_the_index_lists_every_cell_of_the_grid_and_its_links_open(executed):
    home, cells = executed
    rows = Page(home / "executed" / "index.html").rows[1:]
    found = {(row["text"][0], row["text"][1], int(row["text"][2]), row["text"][3].split()[0]) for row in rows}
    assert len(rows) == len(cells)
    assert found == {(cell["dataset"], cell["preset"], cell["seed"], cell["notebook"]) for cell in cells}
    for row in rows:
        assert row["links"]
        for link in row["links"]:
            assert (home / "executed" / link).stat().st_size > 0


def test_the_index_shows_which_notebook_failed_and_why(executed):
    home, _ = executed
    failed = [row for row in Page(home / "executed" / "index.html").rows if row["class"] == "failed"]
    assert [row["text"][0] for row in failed] == DATASETS
    assert all(row["text"][-1] == "ValueError: too few patients <3" for row in failed)


def test_no_name_or_error_breaks_the_page_or_its_links(tmp_path):
    name = 'a "quoted" <set> & 100% more'
    write_notebook(tmp_path / "notebooks", "01_any", "1 + 1")
    folder = tmp_path / "executed" / name / PRESET / f"seed{SEED}"
    folder.mkdir(parents=True)
    known = dict.fromkeys(series.ROW, "x") | {"dataset": name, "status": "done", "error": "<script>alert(1)</script>"}
    (folder / "01_any.json").write_text(json.dumps(known))
    (folder / "01_any.html").write_text("page")
    series.write_index(tmp_path / "executed")
    [_, row] = Page(tmp_path / "executed" / "index.html").rows
    assert row["text"][0] == name and row["text"][-1] == "<script>alert(1)</script>"
    [link] = row["links"]
    assert (tmp_path / "executed" / unquote(link)).read_text() == "page"


def test_the_rendered_page_shows_what_the_notebook_printed(executed):
    home, _ = executed
    page = (place(home, DATASETS[1]) / "01_parameters.html").read_text(encoding="utf-8")
    assert str(home / "runs") in page


def test_formulas_of_a_page_need_no_script(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(r"a $\tau$ and $$x^2$$, $y_$, not `$HOME`")]
    )
    nbformat.write(notebook, tmp_path / "any.ipynb")
    page = series.page_of(tmp_path / "any.ipynb")
    assert "<mi>τ</mi>" in page.replace("&#x003C4;", "τ") and "tau$" not in page
    assert 'display="block"' in page and "$HOME" in page and "$y_$" in page, "what cannot be read is left as it is"


def test_a_second_run_executes_nothing_that_is_done(home, same_runs):
    before = {path: path.stat().st_mtime_ns for path in home.glob("executed/*/*/*/*")}
    cells = run(home, DATASETS, ["01", "03"], **same_runs)
    assert [cell["status"] for cell in cells] == ["skipped"] * 4
    assert all(cell["seconds"] > 0 for cell in cells)
    assert {path: path.stat().st_mtime_ns for path in home.glob("executed/*/*/*/*")} == before


def test_what_is_skipped_stays_in_the_index(home, same_runs):
    index = home / "executed" / "index.html"
    before = index.read_text()
    index.unlink()
    run(home, DATASETS[:1], ["01"], **same_runs)
    assert index.read_text() == before


def test_damaged_or_foreign_files_among_the_records_are_passed_over(home, same_runs):
    folder = place(home, DATASETS[0])
    (folder / "01_parameters.json").write_text("{damaged")
    (folder / "notes.json").write_text('["mine"]')
    cells = run(home, DATASETS[:1], ["01", "03"], **same_runs)
    assert [cell["status"] for cell in cells] == ["done", "skipped"]
    assert (folder / "notes.json").read_text() == '["mine"]'


def test_what_a_reader_wrote_into_an_executed_notebook_is_kept(home, same_runs):
    target = place(home, DATASETS[0]) / "01_parameters.ipynb"
    edited = target.read_text().replace("print(DATASET", "# my answer\\nprint(DATASET")
    assert edited != target.read_text()
    target.write_text(edited)
    [cell] = run(home, DATASETS[:1], ["01"], force=True, **same_runs)
    assert cell["status"] == "done" and "my answer" not in target.read_text()
    [kept] = target.parent.glob("01_parameters.yours-*.ipynb")
    assert kept.read_text() == edited
    run(home, DATASETS[:1], ["01"], force=True, **same_runs)
    assert list(target.parent.glob("01_parameters.yours-*.ipynb")) == [kept]


def test_a_failed_copy_that_the_series_did_not_make_is_kept_under_another_name(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_any", "1 + 1")
    folder = place(tmp_path, "a")
    folder.mkdir(parents=True)
    (folder / "01_any.failed.ipynb").write_text("mine")
    run(tmp_path, ["a"])
    assert [path.read_text() for path in folder.glob("01_any.failed.yours-*.ipynb")] == ["mine"]


def test_a_relative_data_folder_means_the_same_in_the_notebook(tmp_path, monkeypatch):
    write_notebook(tmp_path / "notebooks", "01_any", "import os; print(os.environ['MOCOLAYERS_DATA'])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOCOLAYERS_DATA", "prepared")
    run(tmp_path, ["a"])
    assert str(tmp_path / "prepared") in (place(tmp_path, "a") / "01_any.ipynb").read_text()


def test_a_page_of_a_readers_own_is_not_replaced(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_any", "1 + 1")
    (tmp_path / "executed").mkdir()
    (tmp_path / "executed" / "index.html").write_text("my site")
    with pytest.raises(RunError, match="is not replaced"):
        run(tmp_path, ["a"])
    assert (tmp_path / "executed" / "index.html").read_text() == "my site"
    assert not place(tmp_path, "a").exists(), "and nothing was executed"


def test_skipping_does_not_wait_for_papermill_or_torch_to_load(home, same_runs):
    program = f"""
import sys
from pathlib import Path
from mocolayers.notebook import series
series.PACKAGE = Path({str(series.PACKAGE)!r})
series.NOTEBOOKS = Path({str(home / "notebooks")!r})
[cell] = series.executed({DATASETS[:1]}, [{PRESET!r}], [{SEED}], ["01"],
                         Path({str(same_runs["runs_dir"])!r}), Path({str(home / "executed")!r}))
print(cell["status"], "papermill" in sys.modules, "torch" in sys.modules)"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["skipped", "False", "False"]


def test_editing_a_notebook_reruns_it_alone(home, same_runs):
    write_notebook(home / "notebooks", "01_parameters", 'print("edited")')
    cells = run(home, DATASETS[:1], ["01", "03"], **same_runs)
    assert [cell["status"] for cell in cells] == ["done", "skipped"]
    assert printed(place(home, DATASETS[0]) / "01_parameters.ipynb") == "edited\n"


def test_force_reruns_what_is_up_to_date(home, same_runs):
    target = place(home, DATASETS[0]) / "01_parameters.ipynb"
    before = target.stat().st_mtime_ns
    [cell] = run(home, DATASETS[:1], ["01"], force=True, **same_runs)
    assert cell["status"] == "done"
    assert target.stat().st_mtime_ns > before


def test_a_lost_output_is_made_again(home, same_runs):
    target = place(home, DATASETS[0]) / "01_parameters.ipynb"
    target.unlink()
    [cell] = run(home, DATASETS[:1], ["01"], **same_runs)
    assert cell["status"] == "done"
    assert target.is_file()


def test_a_mended_notebook_takes_the_place_of_its_failed_copy(home, same_runs):
    write_notebook(home / "notebooks", "02_broken", 'print("mended")')
    [cell] = run(home, DATASETS[:1], ["02"], **same_runs)
    folder = place(home, DATASETS[0])
    assert (cell["status"], printed(folder / "02_broken.ipynb")) == ("done", "mended\n")
    assert not (folder / "02_broken.failed.ipynb").exists()
    failed = [row for row in Page(home / "executed" / "index.html").rows if row["class"] == "failed"]
    assert [row["text"][0] for row in failed] == DATASETS[1:]


def test_a_notebook_that_breaks_later_keeps_its_last_good_output_but_counts_as_failed(home, same_runs):
    good = printed(place(home, DATASETS[0]) / "01_parameters.ipynb")
    write_notebook(home / "notebooks", "01_parameters", BROKEN)
    for _ in ("the first time", "and not skipped as done the second time"):
        [cell] = run(home, DATASETS[:1], ["01"], **same_runs)
        assert cell["status"] == "failed"
    assert printed(place(home, DATASETS[0]) / "01_parameters.ipynb") == good


def test_a_killed_series_leaves_nothing_under_the_final_name_and_goes_on(tmp_path):
    folder = place(tmp_path, "a")
    kill = 'import os, signal\nif "VICTIM" in os.environ:\n    os.kill(int(os.environ["VICTIM"]), signal.SIGKILL)\n'
    write_notebook(tmp_path / "notebooks", "01_first", "first = 1")
    write_notebook(tmp_path / "notebooks", "02_killer", "second = 2", f"{kill}    os._exit(0)")
    program = f"""
import os
from pathlib import Path
from mocolayers.notebook import series
series.PACKAGE = Path({str(series.PACKAGE)!r})
os.environ["VICTIM"] = str(os.getpid())
home = Path({str(tmp_path)!r})
series.NOTEBOOKS = home / "notebooks"
series.run_series(["a"], [{PRESET!r}], [{SEED}], (), home / "runs", home / "executed", jobs=1)"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -9
    assert (folder / "02_killer.partial.ipynb").is_file()
    assert not (folder / "02_killer.ipynb").exists()
    assert "VICTIM" not in os.environ
    assert [cell["status"] for cell in run(tmp_path, ["a"])] == ["skipped", "done"]
    assert sorted(path.name for path in folder.glob("*.ipynb")) == ["01_first.ipynb", "02_killer.ipynb"]


def test_two_notebooks_at_a_time_give_the_same_rows_in_order_each_with_its_share_of_the_cores(tmp_path, capfd):
    both = 'import os, time\nprint(os.environ["OMP_NUM_THREADS"])\nstarted = time.time()\ntime.sleep(2)'
    for name in ("01_first", "02_second"):
        write_notebook(tmp_path / "notebooks", name, f"{both}\nprint(started, time.time())")
    write_notebook(tmp_path / "notebooks", "03_broken", BROKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        cells = run(tmp_path, ["a"], jobs=2)
    names = ["01_first", "02_second", "03_broken"]
    assert [(cell["notebook"], cell["status"]) for cell in cells] == list(
        zip(names, ["done", "done", "failed"], strict=True)
    )
    threads, times = zip(
        *(printed(place(tmp_path, "a") / f"{name}.ipynb").split(maxsplit=1) for name in names[:2]), strict=True
    )
    assert set(threads) == {str(max(1, (os.cpu_count() or 1) // 2))}
    (begun, ended), (begun_too, ended_too) = (map(float, pair.split()) for pair in times)
    assert begun < ended_too and begun_too < ended
    assert [cell["status"] for cell in run(tmp_path, ["a"], ["01", "02"], jobs=2)] == ["skipped"] * 2
    assert "02_second: done" in capfd.readouterr().out


def test_a_dead_kernel_is_a_failure_and_not_the_end(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_dies", "import os\nos._exit(1)")
    write_notebook(tmp_path / "notebooks", "02_lives", "1 + 1")
    cells = run(tmp_path, ["a"])
    assert [cell["status"] for cell in cells] == ["failed", "done"]
    assert "died" in cells[0]["error"].lower()


def test_a_notebook_that_makes_its_own_data_set_is_not_run_twice(tmp_path, monkeypatch):
    card = tmp_path / "data" / "a" / "card.json"
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    make = f"from pathlib import Path\ncard = Path({str(card)!r})\ncard.parent.mkdir(parents=True)"
    write_notebook(tmp_path / "notebooks", "01_makes_data", make, 'card.write_text("1")')
    assert [cell["status"] for cell in run(tmp_path, ["a"])] == ["done"]
    assert [cell["status"] for cell in run(tmp_path, ["a"])] == ["skipped"]


def test_an_edit_saved_while_the_notebook_runs_is_not_taken_for_done(tmp_path):
    path = tmp_path / "notebooks" / "01_slow.ipynb"
    save = f"from pathlib import Path\npath = Path({str(path)!r})\ntext = path.read_text().replace('1 + 1', '1 + 2')"
    write_notebook(path.parent, path.stem, f"{save}\npath.write_text(text)", "1 + 1")
    run(tmp_path, ["a"])
    assert nbformat.read(path, as_version=4).cells[-1].source == "1 + 2"
    assert [cell["status"] for cell in run(tmp_path, ["a"])] == ["done"]


def test_a_page_that_cannot_be_rendered_does_not_end_the_series(home, same_runs, monkeypatch):
    def cannot(*_):
        raise RuntimeError("no template")

    monkeypatch.setattr("nbconvert.HTMLExporter.from_file", cannot)
    [cell] = run(home, DATASETS[:1], ["01"], force=True, **same_runs)
    assert (cell["status"], cell["error"]) == ("failed", "RuntimeError: no template")


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_takes_no_more_ends_the_series_with_one_line(home, same_runs, monkeypatch, number, said):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("papermill.execute_notebook", full)
    with pytest.raises(RunError, match=f"01_parameters.ipynb cannot be written .{said}.*same command") as caught:
        run(home, DATASETS[:1], ["01"], force=True, **same_runs)
    assert "\n" not in str(caught.value) and (place(home, DATASETS[0]) / "01_parameters.ipynb").is_file()


def test_a_folder_for_pages_that_cannot_be_made_is_one_line(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_any", "1 + 1")
    (tmp_path / "executed").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="executed/index.html cannot be written"):
        run(tmp_path, ["a"])


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """The fingerprint of a notebook beside a copy of the module and a data folder, all in `tmp_path`."""
    for folder, name in (("mocolayers/method", "moco.py"), ("study", "run.py"), ("study/tables", "rows.csv")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("x = 1")
    monkeypatch.setattr(series, "PACKAGE", tmp_path / "mocolayers")
    monkeypatch.setattr(series, "HOME", tmp_path)
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    notebook = write_notebook(tmp_path, "01_any", "1 + 1")
    values = {"DATASET": "a", "PRESET": PRESET, "SEED": 0, "DEVICE": "auto", "RUNS_DIR": "runs"}

    def fingerprint(**changed):
        now = values | changed
        return series.code_fingerprint(notebook, now) + series.data_fingerprint()

    return fingerprint


def test_the_fingerprint_tells_parameters_apart(fingerprint):
    assert fingerprint() == fingerprint(SEED=0)
    changes = [{}, {"DATASET": "b"}, {"PRESET": "lesson"}, {"SEED": 1}, {"DEVICE": "cpu"}, {"RUNS_DIR": "other"}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)


READ = ("mocolayers/method/losses.py", "study/report.py", "study/tables/rows.csv", "data/a/card.json")


def test_the_fingerprint_changes_with_the_code_the_tables_and_the_prepared_data(fingerprint, tmp_path):
    seen = [fingerprint()]
    for path in (tmp_path / name for name in READ):
        for text in ("one", "two"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            seen.append(fingerprint())
    assert len(set(seen)) == 1 + 2 * len(READ)


@pytest.mark.parametrize("asked", ["auto", "a"])
def test_a_notebook_is_run_again_when_another_data_set_was_prepared(fingerprint, tmp_path, asked):
    """Another one may be chosen, and notebook 01 reads several."""
    before = fingerprint(DATASET=asked)
    card = tmp_path / "data" / "pneumoniamnist" / "card.json"
    card.parent.mkdir(parents=True)
    card.write_text("one")
    assert fingerprint(DATASET=asked) != before


def test_saving_outputs_in_jupyter_does_not_make_a_notebook_count_as_edited(fingerprint, tmp_path):
    before = fingerprint()
    path = tmp_path / "01_any.ipynb"
    content = json.loads(path.read_text())
    output = {"output_type": "stream", "name": "stdout", "text": "2"}
    content["cells"][1] |= {"outputs": [output], "execution_count": 7, "metadata": {"collapsed": True}}
    path.write_text(json.dumps(content))
    assert fingerprint() == before
    content["cells"][1]["source"] = "1 + 2"
    path.write_text(json.dumps(content))
    assert fingerprint() != before


def test_only_numbered_notebooks_belong_to_the_series_in_their_order(tmp_path, monkeypatch):
    for name in ("10_last", "02_second", "01_first", "scratch", "01_first-Copy1/01_first"):
        write_notebook(tmp_path, name)
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    assert [path.stem for path in series.numbered_notebooks()] == ["01_first", "02_second", "10_last"]
    assert [path.stem for path in series.numbered_notebooks(("10", "01"))] == ["01_first", "10_last"]


def test_the_command_exits_with_1_and_says_what_failed(home, same_runs, monkeypatch, capfd):
    code = as_command(home, monkeypatch, dataset=DATASETS[:1], **same_runs)
    said = capfd.readouterr().out.splitlines()
    assert code == 1
    assert "2 of 3 notebooks done (2 were up to date already)" in said
    assert f"FAILED {DATASETS[0]} smoke seed 3 02_broken: ValueError: too few patients <3" in said
    assert said[-1] == f"open {home / 'executed' / 'index.html'}"


def test_the_command_exits_with_0_when_all_is_done(home, same_runs, monkeypatch, capfd):
    assert as_command(home, monkeypatch, dataset=DATASETS, notebook=("01", "03"), **same_runs) == 0
    assert "FAILED" not in capfd.readouterr().out


def test_an_unknown_notebook_is_refused_with_the_names_there_are(home, monkeypatch):
    with pytest.raises(RunError, match="'77'.*01_parameters, 02_broken, 03_memory"):
        as_command(home, monkeypatch, notebook=("77",))


def test_outside_a_checkout_the_command_says_where_the_notebooks_are(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="checkout"):
        as_command(tmp_path, monkeypatch)
    assert not (tmp_path / "executed").exists()


def test_a_data_set_cannot_name_a_folder_elsewhere(home, monkeypatch):
    with pytest.raises(DatasetError, match="no plain name for a data set"):
        as_command(home, monkeypatch, dataset=["../elsewhere"])
