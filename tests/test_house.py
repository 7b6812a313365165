"""The house: rooms import one way, numbers need no plotting library, and every room stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
FILES = sorted([*(HOME / "mocolayers").rglob("*.py"), *(HOME / "study").glob("*.py")])
README = (HOME / "README.md").read_text(encoding="utf-8")
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
SMALL = ("recipe", "runtime", "__main__", "data", "method", "training", "evaluation")
# The lines a room was meant to have; those that it has, and those without blank ones, comments and docstrings.
LINES = {
    "the small module": (2300, 3445, 2227, SMALL),
    "labs": (900, 1081, 737, ("labs",)),
    "notebook": (450, 781, 557, ("notebook",)),
    "study": (850, 1311, 826, ("study",)),
    "data_scripts": (1900, 2610, 1944, ("data_scripts",)),
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


def lines(path: Path) -> tuple[int, int]:
    """All lines of a file, and those that are no blank line, comment or docstring."""
    text = path.read_text(encoding="utf-8")
    texts = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    texts = [node for node in texts if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    said = {number for node in texts for number in range(node.lineno, node.end_lineno + 1)}
    whole = text.splitlines()
    code = [line for number, line in enumerate(whole, start=1) if number not in said and line.strip()]
    return len(whole), sum(not line.lstrip().startswith("#") for line in code)


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
    meant, most, most_code, rooms = LINES[name]
    places = {path: room(module) for module, path in MODULES.items()}
    places |= dict.fromkeys(HOME.glob("data_scripts/*.py"), "data_scripts")
    counts = {str(path.relative_to(HOME)): lines(path) for path, place in places.items() if place in rooms}
    whole, code = (sum(each) for each in zip(*counts.values(), strict=True))
    print(f"{name}: {whole} lines, {code} of them code; meant {meant}; {counts}")
    assert whole <= most and code <= most_code, counts


def test_what_the_readme_says_of_the_rooms_is_so():
    """Code is within 3% of what was meant, but for the notebook's, which has the schematics."""
    assert "have at most 3% more than they were meant to have, but for `notebook`" in README
    assert [name for name, (meant, _, code, _) in LINES.items() if code > 1.03 * meant] == ["notebook"]
    schematics = lines(HOME / "mocolayers" / "notebook" / "schematics.py")[1]
    assert LINES["notebook"][2] - schematics < 1.03 * LINES["notebook"][0]


def test_nothing_needs_what_only_some_systems_have():
    """`resource` is not there on Windows, `fork` neither there nor safe on macOS."""
    for module, path in MODULES.items():
        assert "resource" not in imported(path), module
        assert '"fork"' not in path.read_text(encoding="utf-8"), module


def test_what_the_readme_says_of_speed_is_what_was_measured():
    """A third to a half of the time of lightly's example at the lesson's size, less gain with larger networks."""
    assert "a third to a half of the time of lightly's MoCo example" in README
    table = (HOME / "study" / "bench.md").read_text(encoding="utf-8").splitlines()
    faster = [float(line.split("|")[-2]) for line in table if line.startswith("| lightly's MoCo example")]
    assert all(1.95 < ratio < 3.05 for ratio in faster[:4]) and min(faster) == min(faster[-2:]) > 1
