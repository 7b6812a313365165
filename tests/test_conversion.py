"""Claims about reading many images: into one array on disk, resumed after a kill, from folders and from archives."""

import errno
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import psutil
import pytest
from PIL import Image
from test_data_scripts import noise, prepare, run_script, save

from mocolayers.data.prepared import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
import common  # noqa: E402
import conversion  # noqa: E402
import copies  # noqa: E402
import sources  # noqa: E402

from mocolayers.runtime import DatasetError  # noqa: E402


def patches(root, patients=30, each=20):
    """A tree in the layout of the breast patches."""
    for patient in range(100, 100 + patients):
        for number in range(each):
            name = f"{patient}_idx5_x{number}_y{number}_class{number % 2}.png"
            save(root / str(patient) / str(number % 2) / name, noise(50, 50))
    return root


def start(source, out):
    """The script that reads the patches, started, with at least one chunk done."""
    command = [sys.executable, str(SCRIPTS / "breast_histology.py"), "--source", str(source), "--out", str(out)]
    running = subprocess.Popen(
        [*command, "--side", "256", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background has Ctrl-C ignored, and so may these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in out.glob(".*.work-*/done.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running


def test_a_killed_conversion_goes_on_where_it_was_and_ends_byte_identical(tmp_path):
    source, out = patches(tmp_path / "patches"), tmp_path / "out"
    running = start(source, out)
    readers = psutil.Process(running.pid).children()
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert readers and not psutil.wait_procs(readers, timeout=20)[1], "the processes that read end with the script"
    assert not (out / "breast_histology").exists()
    (journal,) = out.glob(".breast_histology.work-*/done.jsonl")
    done = journal.read_text().count("first")
    with open(journal, "a") as file:
        file.write('\n{"first": 576, "notes": {"cut off by the ki')
    resumed, text = prepare("breast_histology", source, out, "--side", "256")
    assert f"{done * conversion.CHUNK} of 600 images were converted before and are not read again" in text
    whole, _ = prepare("breast_histology", source, tmp_path / "other", "--side", "256")
    assert resumed.card["sha256"] == whole.card["sha256"] and resumed.card["report"] == whole.card["report"]
    assert not list(out.glob(".*")), "the work is gone when the data set stands"


KILLS = int(os.environ.get("MOCOLAYERS_KILLS", "4"))


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path):
    source, rng = patches(tmp_path / "patches", 12, 20), np.random.default_rng(0)
    command = [sys.executable, str(SCRIPTS / "breast_histology.py"), "--source", str(source), "--workers", "1"]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    seconds, files = time.monotonic() - started, ("images", "labels", "patients", "split")
    wanted = [(tmp_path / f"whole/breast_histology/{name}.npy").read_bytes() for name in files]
    killed = 0
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        running = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        running.kill()
        killed += running.wait() == -signal.SIGKILL
        again = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
        assert again.returncode == 0 or "is there already" in again.stderr, again.stderr  # it was killed at the end
        assert [(out / f"breast_histology/{name}.npy").read_bytes() for name in files] == wanted
        assert not list(out.glob(".*")), "nothing that the killed process left"
    assert killed


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    source, out = patches(tmp_path / "patches", 60), tmp_path / "out"
    running = start(source, out)
    for process in (*psutil.Process(running.pid).children(), psutil.Process(running.pid)):
        process.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "stopped; the same command goes on where it was"
    assert "not read again" in prepare("breast_histology", source, out, "--side", "256")[1]


def test_a_full_disk_is_one_line(tmp_path):
    source, out = patches(tmp_path / "patches", 2), tmp_path / "out"
    words = ["--source", source, "--out", out, "--side", "64", "--workers", "1"]
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += f"sys.argv = {['breast_histology.py', *map(str, words)]!r}; sys.path.insert(0, {str(SCRIPTS)!r}); "
    limited += f"runpy.run_path({str(SCRIPTS / 'breast_histology.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: [Errno 27] File too large")


def test_a_full_disk_is_said_with_the_place_where_room_is_needed(tmp_path, monkeypatch):
    def main(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["own.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"No space left on device; make room on the disk of {tmp_path}"):
        common.run(main, common.arguments("", "own", 28, ""))


def test_finished_images_are_not_read_again_and_other_images_are(tmp_path):
    files = [save(tmp_path / f"{n}.png", noise()) for n in range(150)]
    pictures = [conversion.Picture(file, file.stem, 0) for file in files]
    target = tmp_path / "out" / "own"

    def convert():
        return conversion.convert(pictures, counted, 3, 16, target, False, 1)

    first = convert()
    assert first.report["notes"] == {"seen": 150}
    (work,) = target.parent.glob(".own.work-*")
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    again = convert()
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before
    assert np.array_equal(first.images[:], again.images[:]) and again.report == first.report
    save(files[3], noise())
    convert()
    assert work.exists() and len(list(target.parent.glob(".own.work-*"))) == 2, "a changed image is another work"
    conversion.discard(first.work)
    assert first.work == work and not work.exists() and len(list(target.parent.glob(".own.work-*"))) == 1


def test_a_file_of_someone_else_in_the_folder_of_a_conversion_is_kept(tmp_path):
    for name in ("images.npy", "done.jsonl", "thesis.txt"):
        (tmp_path / name).write_text("mine")
    conversion.discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def counted(image):
    return conversion.to_rgb(image), "seen"


def test_pixels_stay_on_disk_and_unreadable_files_leave_no_gap(tmp_path):
    pixels = [noise(16, 16) for _ in range(200)]
    files = [save(tmp_path / f"{n:03d}.png", image) for n, image in enumerate(pixels)]
    for number in (0, 64, 130):
        files[number].write_bytes(b"broken")
    pictures = [conversion.Picture(file, file.stem, 0) for file in files]
    images, kept, report, _ = conversion.convert(pictures, counted, 3, 16, tmp_path / "own", True, 2)
    good = np.delete(np.arange(200), (0, 64, 130))
    assert isinstance(images.array, np.memmap) and np.array_equal(images[:], np.stack(pixels)[good])
    assert [picture.path for picture in kept] == [files[n] for n in good]
    assert report["notes"] == {"seen": 197} and len(report["skipped"]) == 3
    assert np.array_equal(copies.pixel_hashes(images), copies.pixel_hashes(np.stack(pixels)[good]))


def smooth(seed, channels):
    """A picture with few details, as photographs are at 32 px."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    large = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))
    return large[..., :channels]


@pytest.mark.parametrize("channels", [1, 3])
def test_near_equal_pictures_are_found_and_equal_or_merely_similar_ones_are_not(channels):
    images = np.stack([smooth(seed, channels) for seed in range(60)])
    images[7] = images[3]
    images[20] = (images[10].astype(int) + np.random.default_rng(0).integers(-2, 3, images[10].shape)).clip(0, 255)
    images[31] = (images[30] * 0.9 + 12).astype(np.uint8)
    images[41] = (images[40] * 0.8 + images[42] * 0.2).astype(np.uint8)
    images[50:55] = 0
    images[51] = 1
    near = copies.near_pairs(images)
    assert near.tolist() == [[10, 20], [30, 31]]
    split = np.zeros(60, np.uint8)
    split[[20, 30, 31]] = 2, 3, 3
    assert copies.count_pairs(near, split) == {"train and test": 1, "within unlabelled": 1}
    assert copies.near_pairs(images[:5]).shape == (0, 2) and copies.count_pairs(near[:0], split) == {}


@pytest.mark.parametrize(
    "mode, ending", [("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("L", "png"), ("I;16", "png")]
)
def test_every_mode_becomes_colour_and_gray(tmp_path, mode, ending):
    level = np.full((20, 20), 200, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(level.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.stack([level] * 3, axis=2))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"a.{ending}")
    picture = conversion.Picture(tmp_path / f"a.{ending}", "P1", 0)
    for way, channels in ((conversion.colour, 3), (conversion.gray, 1)):
        target = tmp_path / f"out{channels}"
        images = conversion.convert([picture], way, channels, 20, target, False, 1, [0, 65535]).images
        assert abs(images[:].astype(int) - 200).max() < 6


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_an_archive_is_unpacked_once(tmp_path, form):
    source = patches(tmp_path / "patches", 12, 4)
    archive = tmp_path / f"archive.{form}"
    if form == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in source.rglob("*.png"):
                file.write(path, path.relative_to(source))
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(source, ".")
    data, _ = prepare("breast_histology", archive, tmp_path / "out")
    whole, _ = prepare("breast_histology", source, tmp_path / "other")
    assert data.card["sha256"] == whole.card["sha256"]
    shutil.rmtree(tmp_path / "out" / "breast_histology")
    done = run_script("breast_histology", "--source", archive, "--out", tmp_path / "out", "--side", 16)
    assert done.returncode == 0 and "unpacking" not in done.stderr


def test_archives_beside_the_tables_and_split_archives_are_put_together(tmp_path):
    source = tmp_path / "kaggle"
    for name in ("train/1_left.jpeg", "train/1_right.jpeg"):
        save(tmp_path / name, noise())
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as file:
        for path in (tmp_path / "train").iterdir():
            file.write(path, f"train/{path.name}")
    whole = (tmp_path / "train.zip").read_bytes()
    source.mkdir()
    (source / "train.zip.001").write_bytes(whole[: len(whole) // 2])
    (source / "train.zip.002").write_bytes(whole[len(whole) // 2 :])
    (source / "trainLabels.csv").write_text("image,level\n")
    found = sources.open_source(source, "fundus photographs", tmp_path / "out", "")
    assert sorted(p.name for p in found.glob("train/*")) == ["1_left.jpeg", "1_right.jpeg"]
    assert (found / "trainLabels.csv").is_file()


def test_a_changed_archive_is_unpacked_again_and_the_older_folder_is_named(tmp_path, capsys):
    archive = tmp_path / "archive.zip"
    for text in ("old", "newer"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.txt", text)
        found = sources.open_source(archive, "anything", tmp_path / "out", "")
        assert (found / "a.txt").read_text() == text
    first, second = sorted((tmp_path / "out").glob(".*.unpacked"), key=lambda path: path == found)
    said = capsys.readouterr().out
    assert first.name in said and second.name not in said and "remove it if it is old" in said


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_an_archive_that_writes_outside_its_folder_is_refused(tmp_path, form):
    (tmp_path / "secret").write_text("harmless")
    archive = tmp_path / f"bad.{form}"
    if form == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "secret", "../../escaped")
    else:
        with tarfile.open(archive, "w") as file:
            file.add(tmp_path / "secret", "../../escaped")
    with pytest.raises(DatasetError, match="escaped"):
        sources.open_source(archive, "anything", tmp_path / "deep" / "out", "")
    assert not list(tmp_path.rglob("escaped")) and not list((tmp_path / "deep" / "out").glob("*.unpacked"))


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
@pytest.mark.parametrize("damage", ["a header", "a byte", "cut at a member"])
def test_a_damaged_tar_archive_never_counts_as_whole(tmp_path, form, damage):
    source, archive = patches(tmp_path / "patches", 12, 4), tmp_path / f"archive.{form}"
    with tarfile.open(archive, "w:gz" if form == "tar.gz" else "w") as file:
        file.add(source, ".")
    with tarfile.open(archive) as file:
        third = file.getmembers()[-12].offset
    whole = gzip.decompress(archive.read_bytes()) if form == "tar.gz" else archive.read_bytes()
    if damage == "cut at a member":
        whole = whole[:third]
    elif damage == "a header" or form == "tar":
        whole = whole[:third] + bytes(x ^ 0x5A for x in whole[third : third + 64]) + whole[third + 64 :]
    content = gzip.compress(whole) if form == "tar.gz" else whole
    if damage == "a byte" and form == "tar.gz":
        middle = len(content) * 2 // 3
        content = content[:middle] + bytes([content[middle] ^ 0x5A]) + content[middle + 1 :]
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        sources.open_source(archive, "anything", tmp_path / "out", "")
    assert not list((tmp_path / "out").glob("*.unpacked"))


def every(content, places, new):
    """A zip file with bytes of every local and every central header replaced."""
    content = bytearray(content)
    for mark, place in zip((b"PK\3\4", b"PK\1\2"), places, strict=True):
        start = content.find(mark)
        while start >= 0:
            content[start + place : start + place + len(new)] = new
            start = content.find(mark, start + 4)
    return bytes(content)


@pytest.mark.parametrize("what, places, new", [("password", (6, 8), b"\1"), ("Deflate64", (8, 10), b"\x09\0")])
def test_an_archive_that_python_cannot_unpack_is_told_to_be_unpacked_otherwise(tmp_path, what, places, new):
    archive = tmp_path / f"{what}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", b"some bytes" * 9)
    archive.write_bytes(every(archive.read_bytes(), places, new))
    with pytest.raises(DatasetError, match=f"{what}.zip cannot be unpacked: .* unpack it with another program"):
        sources.open_source(archive, "anything", tmp_path / "out", "")


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_an_archive_that_grows_beyond_measure_or_beyond_the_disk_is_refused(tmp_path, form, monkeypatch):
    archive, zeros = tmp_path / f"bomb.{form}", bytes(2**20)
    if form == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for number in range(70):
                file.writestr(f"{number}.png", zeros)
    else:
        (tmp_path / "zeros").write_bytes(zeros)
        with tarfile.open(archive, "w:gz") as file:
            for number in range(70):
                file.add(tmp_path / "zeros", f"{number}.png")
    with pytest.raises(DatasetError, match=f"bomb.{form} is not unpacked: .* not an archive of images"):
        sources.open_source(archive, "anything", tmp_path / "out", "")
    monkeypatch.setattr(sources, "LARGE", 2**40)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda place: usage._replace(free=2**19))
    with pytest.raises(DatasetError, match="GB free; make room"):
        sources.open_source(archive, "anything", tmp_path / "out", "")


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_what_is_unpacked_already_needs_no_room_again(tmp_path, form, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(bytes(2**20))
    archive, partial = tmp_path / f"half.{form}", tmp_path / "partial"
    with zipfile.ZipFile(archive, "w") if form == "zip" else tarfile.open(archive, "w") as file:
        for number in range(4):
            (file.write if form == "zip" else file.add)(tmp_path / f"{number}.png", f"{number}.png")
    partial.mkdir()
    for number in range(2):  # before an interruption
        (partial / f"{number}.png").write_bytes(bytes(2**20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda place: usage._replace(free=2**21 + 1))
    sources._unpack_one(archive, partial)
    assert len(list(partial.iterdir())) == 4


def test_two_archives_that_hold_pictures_of_one_name_are_refused(tmp_path):
    for part in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            file.writestr("README.txt", part)
            file.writestr("a/1.png", part)
    with tarfile.open(tmp_path / "first.tar", "w") as file:
        file.addfile(tarfile.TarInfo("b/\udcff.png"))  # a name in no encoding
    for _ in range(2):  # also when it is tried again
        with pytest.raises(DatasetError, match="train.zip and another archive both hold a/1.png; unpack each into"):
            sources.open_source(tmp_path, "anything", tmp_path / "out", "")
    assert not list((tmp_path / "out").glob("*.unpacked"))


def test_a_read_only_table_beside_archives_is_copied_as_often_as_it_takes(tmp_path):
    (tmp_path / "table.csv").write_text("file,label")
    (tmp_path / "table.csv").chmod(0o444)
    with zipfile.ZipFile(tmp_path / "SCANS.ZIP", "w") as file:
        file.writestr("a/1.png", "x")
    for _ in range(2):
        target = sources.open_source(tmp_path, "anything", tmp_path / "out", "")
        assert (target / "a/1.png").is_file() and (target / "table.csv").stat().st_mode & 0o200


def test_a_damaged_archive_and_a_file_that_is_none_are_clear_errors(tmp_path):
    for name, said in (("broken.zip", "cannot be unpacked"), ("notes.txt", "neither a folder")):
        (tmp_path / name).write_bytes(b"PK\x03\x04 broken")
        with pytest.raises(DatasetError, match=said):
            sources.open_source(tmp_path / name, "anything", tmp_path / "out", "")
