"""Run the notebook series in batch with papermill: a grid of data sets, presets and seeds, resumed and indexed."""

import argparse
import hashlib
import html
import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mocolayers.data.prepared import data_folder
from mocolayers.recipe import PRESETS
from mocolayers.runtime import atomic_write

HOME = Path(__file__).resolve().parents[2]


EXAMPLES = """examples:
  python -m mocolayers series --preset smoke
  python -m mocolayers series --dataset pneumoniamnist nih --seed 0 1 2
  python -m mocolayers series --notebook 03 04 --dataset breast_histology"""


@dataclass
class Cell:
    """One notebook of the grid and how it went; `status` is "done", "skipped" or "failed"."""

    dataset: str
    preset: str
    seed: int
    notebook: str
    status: str = ""
    seconds: float = 0.0
    megabytes: int = 0
    error: str = ""


def run_series(
    datasets: list[str],
    presets: list[str],
    seeds: list[int],
    notebooks: list[Path] | None = None,
    runs_dir: Path = Path("runs"),
    out: Path = Path("executed"),
    device: str = "auto",
    force: bool = False,
) -> list[Cell]:
    """Execute every notebook for every combination; what is done and unchanged is skipped, failures do not stop it.

    Args:
        datasets, presets, seeds: the grid.
        notebooks: paths; None means the numbered ones in `notebooks/`.
        runs_dir: where pretrainings are kept and found again.
        out: executed notebooks go to `out/DATASET/PRESET/seedN/`, with an HTML copy and `out/index.html`.
        device: passed to the notebooks.
        force: execute even what is up to date.
    Returns:
        One `Cell` per notebook and combination, in order.
    """
    notebooks = notebooks or numbered_notebooks()
    cells = []
    for dataset, preset, seed in itertools.product(datasets, presets, seeds):
        for notebook in notebooks:
            values = {"DATASET": dataset, "PRESET": preset, "SEED": seed, "DEVICE": device}
            values["RUNS_DIR"] = str(Path(runs_dir).resolve())
            folder = Path(out) / dataset / preset / f"seed{seed}"
            cells.append(_run_cell(Cell(dataset, preset, seed, notebook.stem), notebook, values, folder, force))
            write_index(Path(out))
    return cells


def numbered_notebooks(prefixes: list[str] | None = None, folder: Path = HOME / "notebooks") -> list[Path]:
    """The notebooks `NN_name.ipynb` in order, or those whose names begin with one of the prefixes.

    Raises:
        ValueError: a prefix that fits no notebook; the message lists them.
    """
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not prefixes:
        return every
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in every):
            raise ValueError(f"no notebook begins with {prefix!r}; there are {', '.join(p.stem for p in every)}")
    return [path for path in every if path.name.startswith(tuple(prefixes))]


def _run_cell(cell: Cell, notebook: Path, values: dict, folder: Path, force: bool) -> Cell:
    target, stamp = folder / notebook.name, folder / f"{notebook.stem}.json"
    code = code_fingerprint(notebook, values)
    if not force and target.is_file() and stamp.is_file():
        before = json.loads(stamp.read_text())
        if before["fingerprint"] == code + data_fingerprint(values["DATASET"]):
            return Cell(**before["cell"] | {"status": "skipped"})
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell.dataset} {cell.preset} seed {cell.seed}: {cell.notebook} ...", flush=True)
    started = time.perf_counter()
    with PeakMemory() as memory:
        cell.error = _execute(notebook, target, values)
    cell.seconds, cell.megabytes = round(time.perf_counter() - started, 1), memory.megabytes
    cell.status = "failed" if cell.error else "done"
    print(f"  {cell.status} in {cell.seconds:.0f} s, {cell.megabytes} MB  {cell.error}".rstrip(), flush=True)
    # The code as it was when the notebook started; the data as they are now, for the notebook may have made them.
    done = code + data_fingerprint(values["DATASET"])
    record = {"fingerprint": "" if cell.error else done, "cell": asdict(cell)}
    atomic_write(stamp, lambda path: path.write_text(json.dumps(record, indent=1)))
    return cell


def _execute(notebook: Path, target: Path, values: dict) -> str:
    """Execute into `target`, or into `NAME.failed.ipynb` and return the first line of the error."""
    import papermill

    work = target.with_name(f"{target.stem}.partial.ipynb")
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    failed.unlink(missing_ok=True)
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
            shutdown_kernel="immediate",  # all is written by then; a polite goodbye takes two seconds a notebook
        )
        write_html(work, target.with_suffix(".html"))
        os.replace(work, target)
    except Exception as error:
        if work.is_file():
            os.replace(work, failed)
        if isinstance(error, papermill.PapermillExecutionError):
            return f"{error.ename}: {error.evalue}".splitlines()[0]
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def write_html(notebook: Path, page: Path) -> None:
    """Render an executed notebook as a page of its own."""
    import nbformat
    from nbconvert import HTMLExporter

    named = {"metadata": {"name": page.stem}}
    body, _ = HTMLExporter().from_notebook_node(nbformat.read(notebook, as_version=4), resources=named)
    atomic_write(page, lambda path: path.write_text(body, encoding="utf-8"))


def code_fingerprint(notebook: Path, values: dict) -> str:
    """Changes with the notebook's source cells, its parameters, the module and the tables: not while it runs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = [json.dumps([[cell["cell_type"], cell["source"]] for cell in cells]), json.dumps(values, sort_keys=True)]
    read = [*Path(__file__).parents[1].rglob("*.py"), *(HOME / "study").glob("*.py")]
    read += [path for path in (HOME / "study" / "tables").rglob("*") if path.suffix in (".csv", ".json")]
    parts += [path.read_text(encoding="utf-8") for path in sorted(read)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def data_fingerprint(dataset: str) -> str:
    """Changes with the prepared data set; for "auto" with any of them, since another one may be chosen."""
    cards = sorted(data_folder().glob("*/card.json" if dataset == "auto" else f"{dataset}/card.json"))
    return hashlib.sha256("\0".join(card.read_text(encoding="utf-8") for card in cards).encode()).hexdigest()[:16]


class PeakMemory:
    """Largest resident memory of any process below this one, in megabytes, sampled every half second."""

    def __enter__(self) -> "PeakMemory":
        self.megabytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    self.megabytes = max(self.megabytes, process.memory_info().rss >> 20)
                except psutil.Error:
                    continue


def write_index(out: Path) -> Path:
    """`out/index.html`: every notebook ever executed there, with links, seconds and memory."""
    rows = []
    for stamp in sorted(out.glob("*/*/*/*.json")):
        cell = Cell(**json.loads(stamp.read_text())["cell"])
        rows.append(_index_row(cell, stamp.parent.relative_to(out).as_posix()))
    page = (HOME / "mocolayers" / "notebook" / "index_page.html").read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    text = page.replace("<!-- rows -->", "\n".join(rows))
    atomic_write(out / "index.html", lambda path: path.write_text(text, encoding="utf-8"))
    return out / "index.html"


def _index_row(cell: Cell, folder: str) -> str:
    name = html.escape(cell.notebook)
    if cell.status == "failed":
        links = f'{name} (<a href="{folder}/{name}.failed.ipynb">as far as it came</a>)'
    else:
        links = f'<a href="{folder}/{name}.html">{name}</a> (<a href="{folder}/{name}.ipynb">notebook</a>)'
    values = [cell.dataset, cell.preset, str(cell.seed)]
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
    tail = f"<td>{cell.seconds:.0f}</td><td>{cell.megabytes}</td>"
    return f'<tr class="{cell.status}">{cells}<td>{links}</td>{tail}<td>{html.escape(cell.error or "done")}</td></tr>'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m mocolayers series`."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["lesson"], help="size of the runs (lesson)")
    parser.add_argument("--dataset", nargs="+", default=["chest_phantom"], help="prepared data sets (chest_phantom)")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="seeds (0)")
    parser.add_argument("--notebook", nargs="+", help="beginnings of names, such as 02 03; default: all")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where pretrainings are kept (runs)")
    parser.add_argument("--out", type=Path, default=Path("executed"), help="where executed notebooks go (executed)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--force", action="store_true", help="execute even what is up to date")


def main(args: argparse.Namespace) -> int:
    """Run the grid and print what failed; the exit code is 1 if anything did."""
    try:
        notebooks = numbered_notebooks(args.notebook)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = run_series(
        args.dataset, args.preset, args.seed, notebooks, args.runs_dir, args.out, args.device, args.force
    )
    failed = [cell for cell in cells if cell.status == "failed"]
    skipped = sum(cell.status == "skipped" for cell in cells)
    print(f"{len(cells) - len(failed)} of {len(cells)} notebooks done ({skipped} were up to date already)")
    for cell in failed:
        print(f"FAILED {cell.dataset} {cell.preset} seed {cell.seed} {cell.notebook}: {cell.error}")
    print(f"open {args.out / 'index.html'}")
    return 1 if failed else 0
