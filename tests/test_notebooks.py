"""Every notebook runs by papermill at the smoke preset, runs again with the same results, and keeps the house rules."""

import ast
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import run_make

from mocolayers.notebook.series import HOME, numbered_notebooks

NOTEBOOKS = numbered_notebooks()
SAID = {"ten seconds": 10, "a quarter of a minute": 15, "half a minute": 30, "a minute": 60}
SAID |= {"a minute and a half": 90, "two minutes": 120, "three minutes": 180}
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def executed(smoke_series):
    rows, place = smoke_series
    return rows, place / "executed" / "chest_phantom" / "smoke" / "seed0"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_at_smoke_within_the_memory_of_a_small_machine(executed, name):
    rows, folder = executed
    assert rows[name]["status"] == "done", rows[name]["error"]
    assert rows[name]["megabytes"] < 1500
    assert (folder / f"{name}.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_page_shows_the_answers_of_folded_cells_without_their_source(executed, name):
    page = (executed[1] / f"{name}.html").read_text(encoding="utf-8")
    assert "What happened, and why" in page and "what_happened(" not in page


def test_the_bench_reads_the_times_that_a_series_leaves(smoke_series):
    code = "import json, sys, whole_series as w; from pathlib import Path; w.series = lambda *_: 1.0\n"
    code += "print(json.dumps(w.measured('smoke', Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(smoke_series[1])]
    done = subprocess.run(command, cwd=HOME / "tests" / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(NAMES) < set(found) and all(float(found[name][0]) > 1 for name in NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_head_names_about_the_time_and_the_memory_that_make_bench_measured(path):
    measured = (HOME / "study" / "notebooks.md").read_text(encoding="utf-8")
    row = re.search(rf"\| {path.stem} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", measured)
    numbers, text = [int(number) for number in row.groups()], path.read_text(encoding="utf-8")
    for preset, seconds, megabytes in (("smoke", *numbers[:2]), ("lesson", *numbers[2:])):
        head = rf"\| `{preset}` \| (?:about )?([a-z ]+?)(?: after notebook \d\d)? \| under ([\d.]+) GB \|"
        said, gigabytes = re.search(head, text).groups()
        assert 0.5 < seconds / SAID[said] < 1.5, (preset, said, seconds)
        assert megabytes < 1000 * float(gigabytes), (preset, gigabytes, megabytes)


def test_the_bench_times_the_import_of_modules_that_there_are():
    code = "import startup\nfor names in startup.IMPORTS:\n    exec(f'import {names}')\n    print(names)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME / "tests/benchmarks", capture_output=True, text=True)
    assert done.returncode == 0 and "mocolayers.training.pretrain" in done.stdout, done.stderr


def test_a_second_pass_from_cached_runs_passes_nbval(executed, tmp_path):
    """nbval executes every cell again in a fresh kernel and fails on any error."""
    rows, folder = executed
    assert all(row["status"] == "done" for row in rows.values())
    copies = HOME / "notebooks"
    names = []
    for name in NAMES:
        # nbval runs a notebook in its own folder, where ../study is found.
        copy = copies / f".nbval_{name}.ipynb"
        copy.write_bytes((folder / f"{name}.ipynb").read_bytes())
        names.append(copy)
    try:
        command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", *map(str, names)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    finally:
        for copy in names:
            copy.unlink()
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_notebook_keeps_the_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(name in tagged[0].source for name in ("DATASET", "PRESET", "SEED", "DEVICE", "RUNS_DIR"))
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    uses = any("RUNS_DIR" in cell.source for cell in code if cell is not tagged[0])
    found = any("RUNS_DIR = home() / RUNS_DIR" in cell.source for cell in code)
    assert found or not uses, "else papermill writes into the folder it was started in"
    assert all(cell.outputs for cell in code if "display(" in cell.source or "figures.show(" in cell.source)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    printed = "".join(
        str(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in code
        for output in cell.outputs
    )
    assert not re.search(r"/(tmp|home|root|Users)/", printed), "a path of the machine that ran it"
    assert path.stat().st_size < 1_000_000
    assert "## Exercises" in "".join(cell.source for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_section_begins_a_slide_and_exercises_are_on_none(path):
    kinds, exercises = {}, False
    for cell in nbformat.read(path, as_version=4).cells:
        exercises = exercises or cell.source.startswith("## Exercises")
        assert cell.cell_type == "code" or "\n## " not in cell.source, "a section in the middle of a cell"
        kind = cell.metadata["slideshow"]["slide_type"]
        assert (kind == "slide") == (
            cell.source.startswith(("# ", "## ")) and cell.cell_type == "markdown" and not exercises
        )
        assert not exercises or kind == "skip"
        kinds[kind] = kinds.get(kind, 0) + 1
    assert kinds["slide"] > 3 and kinds["subslide"] > kinds["slide"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_prediction_has_its_answer_folded_before_the_next_one(path):
    waiting = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and "**Predict" in cell.source:
            assert not waiting, f"no answer to: {waiting}"
            waiting = cell.source
        elif "what_happened(" in cell.source and cell.cell_type == "code":
            assert cell.metadata["jupyter"]["source_hidden"] and cell.outputs, cell.source
            assert cell.source.splitlines()[0].startswith("# "), "its first line is seen although it is folded"
            waiting = ""
    assert not waiting


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_cell_that_is_in_view_is_short_and_solutions_are_folded(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            assert hidden or len(cell.source.splitlines()) <= 12, cell.source
            assert hidden or "solution" not in cell.metadata.get("tags", []), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_exercise_has_a_hint_an_open_answer_a_solution_and_a_check(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "".join(cell.source for cell in cells)
    starts = [n for n, cell in enumerate(cells) if cell.source.startswith("**Exercise ")]
    assert len(starts) >= 3
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(cells)], strict=True), start=1):
        inside = [cell.source for cell in cells[start:stop]]
        solutions = [cell for cell in cells[start:stop] if "solution" in cell.metadata.get("tags", [])]
        assert f"Hint for {number}" in text and " = None  # " in inside[1]
        assert any(f'"Exercise {number}"' in source and "check(" in source for source in inside)
        assert len(solutions) >= 2 and "what_happened(" in solutions[-1].source
        graded = [cell for cell in cells[start:stop] if "nbgrader" in cell.metadata]
        ids = [cell.metadata.nbgrader.grade_id for cell in graded]
        assert ids == [f"answer-{number}", f"check-{number}"] and " = None  # " in graded[0].source
        assert graded[1].metadata.nbgrader.points == 1 and "check(" in graded[1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_nothing_needs_a_name_that_only_a_solution_defines(path):
    """The student edition has no solutions."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    solves = [cell for cell in code if "solution" in cell.metadata.get("tags", [])]
    (solved, _), (defined, used) = (_names(part) for part in (solves, [cell for cell in code if cell not in solves]))
    assert solves and not (solved - defined) & used


def _names(cells) -> tuple[set[str], set[str]]:
    """The names that cells define, and those that they use."""
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return defined, {node.id for node in names if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_committed_picture_has_a_text_for_those_who_cannot_see_it(path):
    notebook = nbformat.read(path, as_version=4)
    pictures = [
        (output, kind)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in ("image/png", "image/jpeg")
        if kind in output.get("data", {})
    ]
    assert pictures
    assert all(output.metadata.get(kind, output.metadata).get("alt") for output, kind in pictures)
    pages = [
        "".join(o.get("data", {}).get("text/html", "")) for cell in notebook.cells for o in cell.get("outputs", [])
    ]
    assert all(page.count("<img") == page.count("<img alt='") for page in pages)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The student edition of `make student`."""
    place = tmp_path_factory.mktemp("student") / "edition"
    done = run_make("student", f"STUDENT={place}")
    assert done.returncode == 0, done.stderr
    return place


def test_an_edition_in_which_students_may_have_worked_is_not_replaced(tmp_path):
    place = tmp_path / "edition"
    place.mkdir()
    (place / f"{NAMES[0]}.ipynb").write_text("my answers")
    done = run_make("student", f"STUDENT={place}")
    assert done.returncode != 0 and f"{place}/ is there already" in done.stdout and "STUDENT=" in done.stdout
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [(f"{NAMES[0]}.ipynb", "my answers")]
    assert [path.name for path in tmp_path.iterdir()] == ["edition"]


@pytest.mark.parametrize("name", NAMES)
def test_the_student_edition_has_exercises_and_hints_but_no_solutions_and_no_outputs(student, name):
    ours = nbformat.read(HOME / "notebooks" / f"{name}.ipynb", as_version=4)
    theirs = nbformat.read(student / f"{name}.ipynb", as_version=4)
    text = "".join(cell.source for cell in theirs.cells)
    assert any("solution" in cell.metadata.get("tags", []) for cell in ours.cells if cell.cell_type == "code")
    assert "Solutions" not in text
    assert all(f"Hint for {number}" in text for number in (1, 2, 3))
    assert not any(cell.get("outputs") for cell in theirs.cells)


def test_the_student_edition_runs_up_to_its_first_open_exercise_and_says_what_to_do(student):
    name = NAMES[0]
    command = [sys.executable, "-m", "papermill", str(student / f"{name}.ipynb"), "-", "--cwd", str(HOME / "notebooks")]
    command += ["-p", "DATASET", "chest_phantom", "-p", "PRESET", "smoke", "--no-progress-bar"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is still open: replace None in the cell above by your answer" in done.stdout + done.stderr
