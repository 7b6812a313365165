"""Where a data set goes: a plain name, and a place where nothing is. Nothing is ever replaced."""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mocolayers.runtime import DatasetError, abandoned


def check_name(name: str) -> None:
    """Refuse a name that could mean another folder than one directly in the data folder."""
    if not name or name != name.strip() or name.startswith(".") or re.search(r'[\x00-\x1f/\\:*?"<>|\[\]]', name):
        raise DatasetError(f"{name!r} is no plain name for a data set; use letters, digits, - and _, for example scans")


def check_target(target: Path) -> None:
    """Refuse a place where something is already, whoever put it there."""
    check_name(target.name)
    if target.exists() or target.is_symlink():
        raise DatasetError(f"{target} is there already and is left as it is; choose another name, or move it away")


def hidden(target: Path, kind: str) -> list[Path]:
    """The hidden folders beside a data set that are named for it: kind is "partial" or "work"."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]+")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in beside if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def clear(target: Path, kind: str, strangers: Callable[[Path], list[str]]) -> None:
    """Remove what killed processes left beside a data set: no folder in use, and none that holds a stranger's file."""
    for folder in hidden(target, kind):
        with suppress(FileNotFoundError), abandoned(folder) as free:  # its owner may remove it meanwhile
            if free and not strangers(folder):
                shutil.rmtree(folder)
