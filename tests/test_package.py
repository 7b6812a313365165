"""Installed with pip alone, the package brings every file and names every package that it imports."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("mocolayers", "study"):
        shutil.copytree(HOME / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(HOME / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    done = subprocess.run([*command, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def files_of(folder: str, ending: str = "") -> set[str]:
    files = (HOME / folder).rglob(f"*{ending}")
    return {f.relative_to(HOME).as_posix() for f in files if f.is_file() and "__pycache__" not in f.parts}


def test_wheel_holds_every_file_of_the_module(wheel):
    assert files_of("mocolayers") - set(wheel.namelist()) == set()


def test_metadata_names_every_package_that_is_imported(wheel):
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")]
    package = files_of("mocolayers", ".py") | files_of("study", ".py")
    assert missing(package, [line for line in lines if "extra ==" not in line or "dask" in line]) == set()
    assert missing(files_of("data_scripts", ".py"), lines) == set(), "the extra `data` lacks it"


def missing(files: set[str], requirements: list[str]) -> set[str]:
    """What the files import from packages that no line of a wheel's metadata names."""
    named = {line.split(": ")[1].split(">")[0].strip().lower() for line in requirements}
    ours = {"mocolayers", "study"} | {path.stem for path in (HOME / "data_scripts").glob("*.py")}
    known, found = packages_distributions(), set()
    for file in files:
        for node in ast.walk(ast.parse((HOME / file).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - ours:
                distributions = {name.lower() for name in known.get(module, [module])}
                if not distributions & named:
                    found.add(f"{file}: {module}")
    return found


def test_binder_installs_all_that_the_package_needs_in_the_versions_that_were_tested():
    tested, binder = (pins(HOME / folder / "requirements.txt") for folder in ("", "binder"))
    different = {name: version for name, version in binder.items() if tested[name] != version.removesuffix("+cpu")}
    assert not different
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {line.split(">")[0] for line in project["dependencies"]} - {"ipython", "traitlets"}  # jupyterlab's own
    assert needed <= set(binder)


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
