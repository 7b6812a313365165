"""Where the images come from: an unpacked folder, an archive that is unpacked once, or the publisher by kagglehub."""

import gzip
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import pandas as pd
from pixels import DICOM, is_dicom
from tqdm import tqdm

from mocolayers.runtime import DatasetError, held

ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *DICOM}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile)
LARGE = 2**26  # bytes; a smaller archive harms no one, however well it is packed
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
        if not source.name.lower().endswith(ARCHIVES):
            raise DatasetError(f"{source} is neither a folder nor one of {', '.join(ARCHIVES)}; it should hold {what}")
        return unpack([source], out)
    archives = [p for p in visible(source) if p.name.lower().endswith((*ARCHIVES, ".zip.001"))]
    if not archives or pictures_in(source):
        return source  # unpacked by its owner, whatever archives stand beside
    # Publishers give the images as archives beside the tables.
    target = unpack(archives, out)
    for table in visible(source, "*.csv") + visible(source, "*.txt"):
        shutil.copyfile(table, target / table.name)  # without its mode, which may be read-only
    return target


def unpack(archives: list[Path], out: Path) -> Path:
    """Unpack archives into one folder of `out`, named after what they are; it stands there only when it is whole.

    What was unpacked before is not unpacked again; after an interruption it goes on with the archive it stood at.

    Raises:
        DatasetError: a damaged archive, or a member that would be written outside the target.
    """
    target = out / f".{archives[0].name}-{fingerprint(archives)}.unpacked"
    if target.is_dir():
        return target
    if older := [path.name for path in out.glob(f".{archives[0].name}-*.unpacked")]:
        print(
            f"{out} holds what was unpacked from another {archives[0].name}; remove it if it is old: {', '.join(older)}"
        )
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with held(partial):
        if not target.is_dir():  # or another process was faster
            for archive in archives:
                done = partial / f".{archive.name}.done"
                if not done.is_file():
                    told = [os.fsdecode(file.read_bytes()) for file in partial.glob(".*.done")]
                    before = set("\0".join(told).split("\0"))
                    names = {os.path.normpath(name) for name in _unpack_one(archive, partial)}
                    if twice := [name for name in names & before if name.lower().endswith(tuple(ENDINGS))]:
                        remedy = "unpack each into a folder of its own name, and pass the folder that holds these"
                        raise DatasetError(f"{archive} and another archive both hold {min(twice)}; {remedy}")
                    done.write_bytes(os.fsencode("\0".join(names)))
            partial.rename(target)
    return target


def _unpack_one(archive: Path, target: Path) -> list[str]:
    """Unpack one archive; returns the names of its members."""
    try:
        if archive.suffix.lower() == ".zip":
            return _unzip(archive, target)
        if archive.name.endswith(".zip.001"):  # one zip, cut into pieces
            with tempfile.TemporaryFile(dir=target) as whole:
                for piece in sorted(archive.parent.glob(archive.name.removesuffix("001") + "*")):
                    with open(piece, "rb") as file:
                        shutil.copyfileobj(file, whole)
                return _unzip(whole, target)
        return _untar(archive, target)
    except DatasetError as error:
        raise DatasetError(f"{archive} is not unpacked: {error}") from None
    except (*DAMAGED, RuntimeError, UnicodeError) as error:  # also a password, or a name in no encoding
        advice = "fetch it again, or unpack it with another program and pass the folder"
        raise DatasetError(f"{archive} cannot be unpacked: {error}; {advice}") from None


def check_size(size: int, left: int, packed: int, target: Path) -> None:
    """Refuse an archive that unpacks to far more than images do, or of which what is left does not fit on the disk."""
    free = shutil.disk_usage(target).free
    if size > LARGE and size > 200 * packed:
        raise DatasetError(f"{packed} bytes hold {size}: not an archive of images; unpack it yourself if it is")
    if left > free:
        raise DatasetError(
            f"{left / 1e9:.1f} GB are still to be unpacked, and {target.parent} has {free / 1e9:.1f} GB free; make room"
        )


def _unzip(archive, target: Path) -> list[str]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        there = [m.file_size for m in members if (target / m.filename).is_file()]  # before an interruption
        size = sum(member.file_size for member in members)
        check_size(size, size - sum(there), os.fstat(file.fp.fileno()).st_size, target)
        for member in tqdm(members, desc="unpacking", unit="file"):
            inside(target, member.filename, "the archive")
            file.extract(member, target)
        return file.namelist()


def _untar(archive: Path, target: Path) -> list[str]:
    size, packed = 0, archive.stat().st_size
    with tarfile.open(archive) as file:
        for member in tqdm(file, desc=f"unpacking {archive.name}", unit="file"):
            size += member.size
            check_size(size, member.size, packed, target)
            # Python's "data" filter refuses paths and links that leave the target, and devices.
            file.extract(member, target, filter="data")
        # tarfile takes a damaged header for the end; the true end is zeros. Reading on compares checksums.
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is damaged or cut short")
        while file.fileobj.read(2**20):
            pass
        return file.getnames()


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


def fingerprint(files: list[Path], about: str = "") -> str:
    """Twelve characters that change with the names, sizes and times of files, and with what is done with them."""
    seen = hashlib.sha256(about.encode())
    for path in files:
        with suppress(OSError):  # a link that leads nowhere: the error is told when it is read
            state = path.stat()
            seen.update(os.fsencode(f"\n{path} {state.st_size} {state.st_mtime_ns}"))
    return seen.hexdigest()[:12]


def printable(name: object) -> str:
    """A path or a part of one, in one line; bytes that are no UTF-8 become a mark that a card and a figure can hold."""
    return re.sub(r"[\x00-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", os.fsencode(str(name)).decode(errors="replace"))


def visible(root: Path, pattern: str = "*") -> list[Path]:
    """What matches below a folder, sorted, without what systems put there: `._x`, `__MACOSX`, `.ipynb_checkpoints`."""
    hidden = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db")
    found = sorted(root.glob(pattern))
    return [path for path in found if not any(map(hidden.fullmatch, path.relative_to(root).parts))]


def pictures_in(root: Path) -> list[Path]:
    """The image files among what is visible; DICOM files often have no ending, or the digits of a UID."""
    found, no_ending = visible(root, "**/*"), re.compile(r"\.?\d*")
    return [p for p in found if p.suffix.lower() in ENDINGS or no_ending.fullmatch(p.suffix) and is_dicom(p)]


def inside(root: Path, name: str, source: object = "the table") -> Path:
    """`root / name`, refused if it would leave `root`; backslashes, as Windows writes them, are understood."""
    path = Path(os.path.abspath(root / (name if (root / name).exists() else name.replace("\\", "/"))))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DatasetError(f"{source}: {name!r} leads out of {root}; remove it")
    return path


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV with at least the given columns, as text without blanks around it; empty rows are left out."""
    try:
        cells = pd.read_csv(path, header=None, dtype=str, na_filter=False, skipinitialspace=True, encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not in UTF-8; export it as UTF-8 with commas") from None
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist; pass the folder or file that holds it") from None
    except pd.errors.ParserError as error:
        first = str(error).split(": ")[-1].strip()
        remedy = "put cells that hold a comma in quotes, and remove empty ones; the first line should name the columns"
        raise DatasetError(f"{path}: {first}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}") from None
    cells = cells.fillna("").apply(lambda column: column.str.strip())
    header, cells = cells.iloc[0].tolist(), cells[1:][(cells[1:] != "").any(axis=1)]
    if missing := [name for name in columns if name not in header]:
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            raise DatasetError(f"{path}: its columns are not separated by commas; export it as UTF-8 with commas")
        raise DatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)}")
    if twice := [name for name in columns if header.count(name) > 1]:
        raise DatasetError(f"{path} has {header.count(twice[0])} columns {twice[0]!r}; rename those that are not meant")
    if cells.empty:
        raise DatasetError(f"{path} has a header and no rows; add a row for each image")
    table = cells.set_axis(header, axis=1).reset_index(drop=True)
    return table.loc[:, ~table.columns.duplicated()]
