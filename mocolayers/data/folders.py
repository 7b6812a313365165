"""Where a data set goes: a plain name, and a place where nothing is. Nothing is ever replaced."""

import re
from pathlib import Path

from mocolayers.runtime import DatasetError


def check_name(name: str) -> None:
    """Refuse a name that could mean another folder than one directly in the data folder."""
    if not name or name != name.strip() or name.startswith(".") or re.search(r'[\x00-\x1f/\\:*?"<>|\[\]]', name):
        raise DatasetError(f"{name!r} is no plain name for a data set; use letters, digits, - and _, for example scans")


def check_target(target: Path) -> None:
    """Refuse a place where something is already, whoever put it there."""
    check_name(target.name)
    if target.exists() or target.is_symlink():
        raise DatasetError(f"{target} is there already and is left as it is; choose another name, or move it away")


def tell_leftovers(target: Path, kind: str, own: Path | None = None) -> None:
    """Name what stopped scripts left hidden beside a data set; kind is "partial", "work" or "*". Nothing is removed."""
    if left := [str(path) for path in sorted(target.parent.glob(f".{target.name}.{kind}-*")) if path != own]:
        print(f"note: {', '.join(left)}: unfinished; if no other script is at work there, you can remove it")
