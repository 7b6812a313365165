"""Where the images come from: an unpacked folder, an archive that is unpacked once, or the publisher by kagglehub."""

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from mocolayers.errors import DatasetError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
CREDENTIALS = "make a token on kaggle.com under Settings, API, and put it into ~/.kaggle/kaggle.json"


def open_source(source: Path | None, what: str, out: Path, kaggle: str) -> Path:
    """The folder that holds the publisher's files.

    Args:
        source: a folder, or an archive, which is unpacked into `out` once; None downloads.
        what: what the folder should hold, for the error.
        out: folder of prepared data sets.
        kaggle: "owner/name" of a data set or "competition:name", downloaded with the user's own credentials.
    Raises:
        DatasetError: nothing there, an archive with a path that leaves it, or no download.
    """
    if source is None:
        source = _download(kaggle, what)
    if not source.exists():
        raise DatasetError(f"{source} does not exist; --source wants the folder or archive with {what}")
    source = source.resolve()
    if source.is_file():
        if not source.name.endswith(ARCHIVES):
            raise DatasetError(f"{source} is neither a folder nor one of {', '.join(ARCHIVES)}; it should hold {what}")
        return unpack([source], out / f".{source.name}.unpacked")
    archives = sorted(p for p in source.iterdir() if p.name.endswith((*ARCHIVES, ".zip.001")))
    if not archives:
        return source
    # Publishers give the images as archives beside the tables.
    target = unpack(archives, out / f".{source.name}.unpacked")
    for table in [*source.glob("*.csv"), *source.glob("*.txt")]:
        shutil.copy2(table, target / table.name)
    return target


def unpack(archives: list[Path], target: Path) -> Path:
    """Unpack archives into one folder; it stands under its final name only when it is whole.

    What was unpacked before is not unpacked again; after an interruption it goes on with the archive it stood at.

    Raises:
        DatasetError: a damaged archive, or a member that would be written outside the target.
    """
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        done = partial / f".{archive.name}.done"
        if done.is_file():
            continue
        try:
            if archive.name.endswith((".zip", ".zip.001")):
                _unzip(archive, partial)
            else:
                _untar(archive, partial)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise DatasetError(f"{archive} cannot be unpacked: {error}") from None
        done.touch()
    partial.rename(target)
    return target


def _unzip(archive: Path, target: Path) -> None:
    pieces = sorted(archive.parent.glob(archive.name.removesuffix(".001") + ".0*")) or [archive]
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(tempfile.TemporaryFile(dir=target)) if len(pieces) > 1 else archive
        for piece in pieces if len(pieces) > 1 else []:
            with open(piece, "rb") as file:
                shutil.copyfileobj(file, whole)
        file = stack.enter_context(zipfile.ZipFile(whole))
        for member in tqdm(file.infolist(), desc=f"unpacking {archive.name}", unit="file"):
            inside(target, member.filename, archive)
            file.extract(member, target)


def _untar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as file:
        for member in tqdm(file, desc=f"unpacking {archive.name}", unit="file"):
            # Python's "data" filter refuses paths and links that leave the target, and devices.
            file.extract(member, target, filter="data")


def _download(kaggle: str, what: str) -> Path:
    """kagglehub's own copy; it resumes downloads and keeps them for the next time."""
    try:
        import kagglehub

        name = kaggle.removeprefix("competition:")
        fetch = kagglehub.dataset_download if name == kaggle else kagglehub.competition_download
        return Path(fetch(name))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"{kaggle} could not be downloaded ({first}). To download: {CREDENTIALS} and accept the "
            f"terms on its page. Or pass --source PATH, a folder or archive with {what}"
        ) from None


def inside(root: Path, name: str, source: object = "the table") -> Path:
    """`root / name`, refused if it would leave `root`."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DatasetError(f"{source}: {name!r} leads out of {root}; remove that line")
    return path


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV with at least the given columns, as text."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}") from None
    table.columns = table.columns.str.strip()
    if missing := [name for name in columns if name not in table]:
        raise DatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table
