"""Claims about reading many images: a part at a time, resumed after a kill, from folders and from archives."""

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

from mocolayers.data.prepared import SCRIPTS, load

sys.path.insert(0, str(SCRIPTS))
import conversion  # noqa: E402
import sources  # noqa: E402

from mocolayers.runtime import DatasetError  # noqa: E402


def patches(root, patients=30, each=20):
    """A tree in the layout of the breast patches."""
    for patient in range(100, 100 + patients):
        for number in range(each):
            name = f"{patient}_idx5_x{number}_y{number}_class{number % 2}.png"
            save(root / str(patient) / str(number % 2) / name, noise(50, 50))
    return root


def test_a_killed_conversion_goes_on_where_it_was_and_ends_byte_identical(tmp_path):
    source, out = patches(tmp_path / "patches"), tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / "breast_histology.py"), "--source", str(source), "--out", str(out)]
    command += ["--side", "256", "--workers", "1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob(".breast_histology.work-*/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    readers = psutil.Process(running.pid).children()
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert readers and not psutil.wait_procs(readers, timeout=20)[1], "the processes that read end with the script"
    parts = {path: path.stat().st_mtime_ns for path in out.glob(".breast_histology.work-*/[0-9]*.npz")}
    assert parts and not (out / "breast_histology").exists()
    read = subprocess.run([*command, "--seed", "0"], capture_output=True, text=True)
    assert read.returncode == 0 and "were converted before and are not read again" in read.stdout
    whole, _ = prepare("breast_histology", source, tmp_path / "other", "--side", "256")
    resumed = load("breast_histology", out, verify=True)
    assert resumed.card["sha256"] == whole.card["sha256"]
    assert not list(out.glob(".*")), "the parts are gone when the data set stands"


def test_finished_parts_are_not_read_again_and_other_images_are(tmp_path):
    files = [save(tmp_path / f"{n}.png", noise()) for n in range(40)]
    pictures = [conversion.Picture(file, file.stem, 0) for file in files]
    target = tmp_path / "out" / "own"

    def convert(prepare, chosen=pictures):
        return conversion.convert(chosen, prepare, 16, target, False, 1)

    first = convert(counted)
    (folder,) = target.parent.glob(".own.work-*")
    parts = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = convert(counted)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == parts
    assert all(np.array_equal(a, b) for a, b in zip(first.images.blocks(), again.images.blocks(), strict=True))
    save(files[3], noise())
    convert(counted)
    assert not folder.exists() and len(list(target.parent.glob(".own.work-*"))) == 1, "a changed image is another work"


def counted(image):
    return conversion.to_rgb(image), "seen"


def test_rows_can_be_chosen_without_reading_pixels(tmp_path):
    pixels = [noise(16, 16) for _ in range(600)]
    files = [save(tmp_path / f"{n:03d}.png", image) for n, image in enumerate(pixels)]
    pictures = [conversion.Picture(file, file.stem, 0) for file in files]
    images, kept, report = conversion.convert(pictures, counted, 16, tmp_path / "work", False, 1)
    assert report["notes"] == {"seen": 600} and len(images.files) == 3, "256 images to a part"
    rows = np.arange(5, 600, 7)
    assert images[rows].shape == (len(rows), 16, 16, 3)
    assert np.array_equal(np.concatenate(list(images[rows].blocks())), np.stack(pixels)[rows])
    assert np.array_equal(images[rows].hashes, conversion.pixel_hashes(np.stack(pixels)[rows]))


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
    with Image.open(tmp_path / f"a.{ending}") as read:
        assert abs(np.asarray(conversion.to_rgb(read)).astype(int) - 200).max() < 6
        assert abs(np.asarray(conversion.to_gray(read)).astype(int) - 200).max() < 6


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


def test_a_changed_archive_is_unpacked_again(tmp_path):
    archive = tmp_path / "archive.zip"
    for text in ("old", "newer"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.txt", text)
        assert (sources.open_source(archive, "anything", tmp_path / "out", "") / "a.txt").read_text() == text


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


def test_a_damaged_archive_and_a_file_that_is_none_are_clear_errors(tmp_path):
    for name, said in (("broken.zip", "cannot be unpacked"), ("notes.txt", "neither a folder")):
        (tmp_path / name).write_bytes(b"PK\x03\x04 broken")
        with pytest.raises(DatasetError, match=said):
            sources.open_source(tmp_path / name, "anything", tmp_path / "out", "")
