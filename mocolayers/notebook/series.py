"""Run the notebook series in batch with papermill: a grid of data sets, presets and seeds, resumed and indexed."""

import errno
import hashlib
import html
import itertools
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from joblib import Parallel, delayed

from mocolayers.data.folders import check_name
from mocolayers.data.prepared import SCRIPTS, data_folder
from mocolayers.recipe import PRESETS
from mocolayers.runtime import RunError, atomic_write, resolve_device, writing

PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE.parent
NOTEBOOKS = HOME / "notebooks"
ROW = ("dataset", "preset", "seed", "notebook", "seconds", "megabytes", "status", "error")
NO_PLACE = (errno.ENOSPC, errno.EROFS, errno.EACCES)
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mocolayers: executed notebooks</title>
<style>body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem } td, th { text-align: left; padding: .3rem .7rem }
.failed { color: #a33 }</style>
<h1>Executed notebooks</h1>
<table>
"""


def run_series(
    dataset: Sequence[str] = ("chest_phantom",),
    preset: Sequence[str] = ("lesson",),
    seed: Sequence[int] = (0,),
    notebook: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    out: Path = Path("executed"),
    device: str = "auto",
    force: bool = False,
    jobs: int | None = None,
) -> int:
    """Execute the notebooks for every data set, preset and seed, and print what failed; returns a command's exit code.

    examples:
      python -m mocolayers series --preset smoke
      python -m mocolayers series --dataset pneumoniamnist nih --seed 0 1 2
      python -m mocolayers series --notebook 03 04 --dataset breast_histology

    Args:
        dataset: prepared data sets.
        preset: sizes of the runs: smoke, lesson, paper.
        seed: seeds.
        notebook: beginnings of names, such as 02 03; none means all.
        runs_dir: where pretrainings are kept and found again.
        out: executed notebooks go to `out/DATASET/PRESET/seedN/`, with an HTML copy and `out/index.html`.
        device: passed to the notebooks.
        force: execute even what is up to date.
        jobs: notebooks executed at a time, each with its share of the cores; None is two, or one on a GPU.
    Raises:
        RunError: there is no such notebook or preset.
    """
    jobs = jobs or (2 if resolve_device(device).type == "cpu" else 1)
    rows = list(executed(dataset, preset, seed, notebook, runs_dir, out, device, force, jobs))
    failed = [row for row in rows if row["status"] == "failed"]
    skipped = sum(row["status"] == "skipped" for row in rows)
    print(f"{len(rows) - len(failed)} of {len(rows)} notebooks done ({skipped} were up to date already)")
    for row in failed:
        print("FAILED {dataset} {preset} seed {seed} {notebook}: {error}".format(**row))
    print(f"open {Path(out) / 'index.html'}")
    return 1 if failed else 0


def executed(dataset, preset, seed, notebook=(), runs_dir="runs", out="executed", device="auto", force=False, jobs=1):
    """Yield a dict with the keys `ROW` for each notebook of `run_series`; status is "done", "skipped" or "failed"."""
    paths, planned = numbered_notebooks(notebook), []
    write_index(Path(out))
    for name, size, number in itertools.product(dataset, preset, seed):
        check_name(name)
        if size not in PRESETS:
            raise RunError(f"preset {size!r} is unknown; choose one of {', '.join(PRESETS)}")
        values = {"DATASET": name, "PRESET": size, "SEED": number, "DEVICE": device}
        values["RUNS_DIR"] = str(Path(runs_dir).resolve())
        folder = Path(out) / name / size / f"seed{number}"
        planned += [delayed(_run)(path, values, folder, force) for path in paths]
    # joblib gives each process its share of the cores, and its kernel inherits that.
    for row in Parallel(jobs, return_as="generator")(planned):
        yield row
        write_index(Path(out))


def numbered_notebooks(prefixes: Sequence[str] = ()) -> list[Path]:
    """The notebooks `NN_name.ipynb` in order, or those whose names begin with one of the prefixes.

    Raises:
        RunError: there are none, or a prefix fits none.
    """
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise RunError(
            f"no notebooks in {NOTEBOOKS}: they come with a checkout of the repository; pip install -e . there"
        )
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in every):
            raise RunError(f"no notebook begins with {prefix!r}; there are {', '.join(p.stem for p in every)}")
    return [path for path in every if path.name.startswith(tuple(prefixes or [""]))]


def _run(notebook: Path, values: dict, folder: Path, force: bool) -> dict:
    with writing(folder / notebook.name):
        return _executed(notebook, values, folder, force)


def _executed(notebook: Path, values: dict, folder: Path, force: bool) -> dict:
    target, stamp = folder / notebook.name, folder / f"{notebook.stem}.json"
    code, before = code_fingerprint(notebook, values), _read(stamp)
    if not force and target.is_file() and before.get("fingerprint") == code + data_fingerprint():
        return before | {"status": "skipped"}
    folder.mkdir(parents=True, exist_ok=True)
    row = {"dataset": values["DATASET"], "preset": values["PRESET"], "seed": values["SEED"], "notebook": notebook.stem}
    print("{dataset} {preset} seed {seed}: {notebook} ...".format(**row), flush=True)
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    _set_aside(target, before.get("written"))
    _set_aside(failed, before.get("failed"))
    started = time.perf_counter()
    row["error"], row["megabytes"] = _execute(notebook, target, failed, values)
    row |= {"seconds": round(time.perf_counter() - started, 1), "status": "failed" if row["error"] else "done"}
    print("  {notebook}: {status} in {seconds:.0f} s, {megabytes} MB  {error}".format(**row).rstrip(), flush=True)
    # The code as it was when the notebook started; the data as they are now, for the notebook may have made them.
    row["fingerprint"] = "" if row["error"] else code + data_fingerprint()
    for name, path in (("written", target), ("failed", failed)):
        row[name] = _digest(path.read_bytes()) if path.is_file() else ""
    atomic_write(stamp, lambda path: path.write_text(json.dumps(row, indent=1)))
    return row


def _set_aside(path: Path, written: str | None) -> None:
    """Give an executed copy that someone changed another name, so that the next one does not replace it."""
    if path.is_file() and _digest(path.read_bytes()) != written:
        kept = path.with_name(f"{path.stem}.yours-{time.strftime('%Y%m%d-%H%M%S')}.ipynb")
        os.replace(path, kept)
        print(f"  the executed copy was changed by hand; it is kept as {kept}", flush=True)


def _execute(notebook: Path, target: Path, failed: Path, values: dict) -> tuple[str, int]:
    """Execute into `target`, or into `failed`: the first line of the error, and the kernel's peak in MB."""
    import papermill

    work, peaks, error = target.with_name(f"{target.stem}.partial.ipynb"), [0], ""
    if "MOCOLAYERS_DATA" in os.environ:  # the kernel runs in another folder, where a relative one means another
        os.environ["MOCOLAYERS_DATA"] = str(data_folder().resolve())
    try:
        papermill.execute_notebook(
            notebook,
            work,
            values,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar=False,
            log_output=False,
            extra_arguments=["--log-level=ERROR"],
            shutdown_kernel="immediate",  # all is written by then; shutting it down cleanly takes two seconds
            on_cell_executed=lambda **_: peaks.append(peak_megabytes()),
        )
        page = page_of(work)
        atomic_write(target.with_suffix(".html"), lambda path: path.write_text(page, encoding="utf-8"))
        os.replace(work, target)
    except papermill.PapermillExecutionError as problem:
        error = f"{problem.ename}: {problem.evalue}".splitlines()[0]
    except Exception as problem:
        if getattr(problem, "errno", None) in NO_PLACE:
            raise  # the next notebook would fail like this one
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    failed.unlink(missing_ok=True)
    if work.is_file():
        os.replace(work, failed)
    return error, max(peaks)


def page_of(notebook: Path) -> str:
    """An executed notebook as an HTML page without folded cells, whose formulas need no script from a network."""
    from latex2mathml.converter import convert
    from nbconvert.exporters import html as exporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer
    from traitlets.config import Config

    class Formulas(IPythonRenderer):
        def inline_math(self, body: str, display: str = "inline") -> str:
            with suppress(Exception):  # a formula of the reader's that it cannot read is left to MathJax
                return convert(body, display=display)
            return super().inline_math(body)

        def block_math(self, body: str) -> str:
            return self.inline_math(body, "block")

    exporter.IPythonRenderer = Formulas  # nbconvert has no setting for it
    hide = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": ["hide-input"]})
    return exporter.HTMLExporter(hide).from_file(str(notebook), {"metadata": {"name": notebook.name.split(".")[0]}})[0]


def peak_megabytes() -> int:
    """Largest memory so far of a process below this one: Linux and Windows keep it, macOS tells what is held now."""
    import psutil

    peaks = [0]
    for process in psutil.Process().children(recursive=True):
        try:
            memory, status = process.memory_info(), Path(f"/proc/{process.pid}/status")
            kept = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
        except (psutil.Error, OSError):
            continue
        peaks.append(int(kept[1]) >> 10 if kept else getattr(memory, "peak_wset", memory.rss) >> 20)
    return max(peaks)


def code_fingerprint(notebook: Path, values: dict) -> str:
    """Changes with the notebook's source cells, its parameters, the code and the tables: not while it runs."""
    cells = json.loads(notebook.read_bytes())["cells"]
    files = [path for room in (PACKAGE, HOME / "study", SCRIPTS) for path in room.rglob("*")]
    read = [path for path in files if path.suffix in (".py", ".csv")]
    about = json.dumps([[[cell["cell_type"], cell["source"]] for cell in cells], values])
    return _digest(about.encode(), *(path.read_bytes() for path in sorted(read)))


def data_fingerprint() -> str:
    """Changes with any prepared data set: "auto" may choose another one, and a notebook may read several."""
    folders = sorted(card.parent for card in data_folder().glob("*/card.json"))
    small = ("card.json", "labels.npy", "patients.npy", "split.npy")  # labels may have been corrected by hand
    files = [folder / name for folder in folders for name in small]
    return _digest(*(file.read_bytes() for file in files if file.is_file()))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _read(stamp: Path) -> dict:
    """What is known of an executed notebook; nothing if its file is missing, damaged or not ours."""
    try:
        found = json.loads(stamp.read_bytes())
        return found if set(ROW) <= set(found) else {}
    except (OSError, ValueError, TypeError):
        return {}


def write_index(out: Path) -> None:
    """`out/index.html`: every notebook ever executed there, with links, seconds and memory."""
    index = out / "index.html"
    if index.is_file() and not index.read_text(encoding="utf-8", errors="replace").startswith(PAGE[:200]):
        raise RunError(f"{index} is a page of yours and is not replaced; choose another folder: --out FOLDER")
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in ROW)]
    for stamp in sorted(out.glob("*/*/*/*.json")):
        if row := _read(stamp):
            place = quote(stamp.relative_to(out).with_suffix("").as_posix())
            ending = ".failed.ipynb" if row["status"] == "failed" else ".html"
            cells = {name: html.escape(str(row[name])) for name in ROW}
            cells["notebook"] = f'<a href="{place}{ending}">{cells["notebook"]}</a>'
            lines.append(f'<tr class="{cells["status"]}">' + "".join(f"<td>{cell}</td>" for cell in cells.values()))
    text = PAGE + "\n".join(lines) + "\n</table>\n"
    with writing(index):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(index, lambda path: path.write_text(text, encoding="utf-8"))
