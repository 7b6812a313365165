"""The house: rooms import one way, numbers need no plotting library, and every room stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
FILES = sorted([*(HOME / "mocolayers").rglob("*.py"), *(HOME / "study").glob("*.py")])
MODULES = {".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

# Which rooms a room may import besides itself; `__main__` and the notebooks may import all.
MAY_IMPORT = {
    "runtime": set(),
    "recipe": {"runtime"},
    "method": set(),
    "data": {"runtime", "recipe"},
    "training": {"method", "data", "runtime", "recipe"},
    "evaluation": {"training", "method", "data", "runtime", "recipe"},
    "notebook": {"evaluation", "training", "method", "data", "runtime", "recipe"},
    "labs": {"notebook", "evaluation", "training", "method", "data", "runtime", "recipe"},
    "study": {"__main__", "notebook", "evaluation", "training", "method", "data", "runtime", "recipe"},
}
# The lines a room was meant to have, and those that it has: blank ones and docstrings included.
LINES = {
    "the small module": (2300, 3576, ("recipe", "runtime", "__main__", "data", "method", "training", "evaluation")),
    "labs": (900, 1097, ("labs",)),
    "notebook": (450, 781, ("notebook",)),
    "study": (850, 1336, ("study",)),
}
PICTURES = ("matplotlib", "IPython", "ipywidgets")
NUMBERS = [name for name in MODULES if "figures" not in name and not name.endswith("__main__")]
NUMBERS = [name for name in NUMBERS if not name.startswith(("mocolayers.labs", "mocolayers.notebook"))]


def room(module: str) -> str:
    """The room of a module: "mocolayers.data.views" is in "data", "study.run" in "study"."""
    parts = module.split(".")
    return parts[0] if parts[0] == "study" or len(parts) == 1 else parts[1]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of this project that a module imports."""
    return {name for name in imported(MODULES[module]) if name in MODULES and name != "mocolayers"}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in MAY_IMPORT])
def test_imports_point_one_way(module):
    wrong = {name for name in ours(module) if room(name) not in MAY_IMPORT[room(module)] | {room(module)}}
    assert not wrong, f"{module} imports {wrong}"


def test_every_module_is_in_a_room_with_rules():
    assert {room(name) for name in MODULES} == set(MAY_IMPORT) | {"mocolayers", "__main__"}


def test_no_module_imports_itself_through_others():
    below = {name: ours(name) for name in MODULES}
    for _ in MODULES:
        below = {name: set.union(seen, *(below[other] for other in seen)) for name, seen in below.items()}
    assert not [name for name, seen in below.items() if name in seen]


def test_the_method_can_be_lifted_into_another_project():
    for module in MODULES:
        if room(module) == "method":
            outside = {name.split(".")[0] for name in imported(MODULES[module])} - set(sys.stdlib_module_names)
            inside = {name for name in imported(MODULES[module]) if name.startswith("mocolayers.")}
            assert outside <= {"torch", "torchvision", "mocolayers"}, module
            assert all(name.startswith("mocolayers.method") for name in inside), module


def test_no_module_that_computes_a_number_loads_a_plotting_library():
    lines = [f"import {name}" for name in NUMBERS]
    check = f"import sys; print([name for name in {PICTURES} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], capture_output=True, text=True, cwd=HOME)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", LINES)
def test_a_room_does_not_grow(name):
    meant, most, rooms = LINES[name]
    counts = {key: len(path.read_text(encoding="utf-8").splitlines()) for key, path in MODULES.items()}
    by_room = {each: sum(n for key, n in counts.items() if room(key) == each) for each in rooms}
    print(f"{name}: {sum(by_room.values())} lines, meant {meant} {by_room}")
    assert sum(by_room.values()) <= most, by_room


def test_the_data_scripts_do_not_grow():
    counts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in HOME.glob("data_scripts/*.py")}
    print(f"data_scripts: {sum(counts.values())} lines, meant 1900 {counts}")
    assert sum(counts.values()) <= 2602, counts


def test_nothing_needs_what_only_some_systems_have():
    """`resource` is not there on Windows, `fork` neither there nor safe on macOS."""
    for module, path in MODULES.items():
        assert "resource" not in imported(path), module
        assert '"fork"' not in path.read_text(encoding="utf-8"), module


def test_what_the_readme_says_of_speed_is_what_was_measured():
    """A third to a half of the time of lightly's example at the lesson's size, less gain with larger networks."""
    assert "a third to a half of the time of lightly's MoCo example" in (HOME / "README.md").read_text(encoding="utf-8")
    lines = (HOME / "study" / "bench.md").read_text(encoding="utf-8").splitlines()
    faster = [float(line.split("|")[-2]) for line in lines if line.startswith("| lightly's MoCo example")]
    assert all(1.95 < ratio < 3.05 for ratio in faster[:4]) and min(faster) == min(faster[-2:]) > 1
