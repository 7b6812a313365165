"""Folders that are replaced as a whole: only what we made ourselves, and nothing that another process works in."""

import filecmp
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from mocolayers.runtime import DatasetError, abandoned, held, is_temporary

ARRAYS = ("images", "labels", "patients", "split")
CHECKED, SHEET = "images.checked", "contact_sheet.png"
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers put these into any folder


def check_name(name: str) -> None:
    """Refuse a name that could mean another folder than one directly in the data folder."""
    if not name or name != name.strip() or name.startswith(".") or re.search(r'[\x00-\x1f/\\:*?"<>|\[\]]', name):
        raise DatasetError(f"{name!r} is no plain name for a data set; use letters, digits, - and _, for example scans")


def check_target(target: Path) -> None:
    """Refuse a folder that may not be replaced: it holds something that no script of ours wrote."""
    check_name(target.name)
    if target.is_symlink() or target.is_file():
        raise DatasetError(f"{target} is a file or a link, and is not replaced; choose another name")
    if target.is_dir() and any(target.iterdir()) and (others := strangers(target)):
        raise DatasetError(
            f"{target} is there already and holds {others[0]!r}, which no data script wrote; it is left as it is. "
            "Choose another name, or move it away"
        )
    if target.is_dir() and (name := corrected(target)):
        raise DatasetError(
            f"{target / name}.npy was changed after it was prepared, perhaps corrected by hand; it is not replaced. "
            "Choose another name, or move it away"
        )


def corrected(folder: Path) -> str | None:
    """The first of the small arrays of a prepared data set that can be read but is not what the card says."""
    try:
        prepared = dict(json.loads((folder / "card.json").read_text(encoding="utf-8"))["sha256"])
        for name in ARRAYS[1:]:
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="r")
            if hashlib.sha256(path.read_bytes()).hexdigest() != prepared[name]:
                return name
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None  # damaged: it may be made again
    return None


def strangers(folder: Path) -> list[str]:
    """What is in a folder and not part of a prepared data set: everything where there is no card."""
    found = {path.name for path in folder.iterdir()} - CLUTTER
    try:
        arrays = list(json.loads((folder / "card.json").read_text(encoding="utf-8"))["sha256"])
    except (OSError, KeyError, TypeError):
        return sorted(found) or ["no card.json"]  # no card, or one of another program
    except ValueError:
        arrays = ARRAYS  # a damaged card; its data set may be made again
    ours = {"card.json", CHECKED, SHEET, *(f"{name}.npy" for name in arrays)}
    return sorted(name for name in found - ours if not any(is_temporary(name, of) for of in (CHECKED, SHEET)))


def hidden(target: Path, kind: str) -> list[Path]:
    """The hidden folders beside a data set that are named for it: kind is "partial", "old" or "work"."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]+")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in beside if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def clear(target: Path, kind: str, strangers: Callable[[Path], list[str]] = strangers) -> None:
    """Remove what killed processes left beside a data set: no folder in use, and none that holds a stranger's file."""
    for folder in hidden(target, kind):
        with suppress(FileNotFoundError), abandoned(folder) as free:  # its owner may remove it meanwhile
            if free and not strangers(folder):
                shutil.rmtree(folder)


def restore(target: Path) -> None:
    """Give a data set its name back if a process was killed just after it had moved it away to replace it."""
    if target.exists() or not hidden(target, "old"):
        return
    with held(target.parent):
        moved = [folder for folder in hidden(target, "old") if not strangers(folder)]
        if moved and not target.exists():
            max(moved, key=lambda folder: folder.stat().st_mtime).rename(target)


def put_in_place(work: Path, target: Path) -> None:
    """Rename the finished folder `work` to `target`; an equal one that another process put there meanwhile stays."""
    with held(target.parent):
        check_target(target)
        if target.exists():
            files = [path.name for path in work.iterdir() if path.name != CHECKED]
            if len(filecmp.cmpfiles(work, target, files, shallow=False)[0]) == len(files):
                return
            old = work.with_name(work.name.replace(".partial-", ".old-"))
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
        for kind in ("partial", "old"):
            clear(target, kind)
