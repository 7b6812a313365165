"""Claims about images and tables as researchers have them: each comes out right, or stops with one clear line.

`python tests/test_hostile_inputs.py` prints the table of all kinds of input with their outcome.
"""

import csv
import os
import sys
from functools import partial

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_scripts import run_script

from mocolayers.data.prepared import SCRIPTS, load
from mocolayers.runtime import DatasetError

sys.path.insert(0, str(SCRIPTS))
import common  # noqa: E402
import conversion  # noqa: E402
import copies  # noqa: E402
import folder  # noqa: E402
import pixels  # noqa: E402
import retina  # noqa: E402
import sources  # noqa: E402

MANY = settings(max_examples=50, deadline=None, derandomize=True, database=None)

RAMP = np.linspace(0, 1, 64)[None] * np.ones((64, 1))


def made(root, *words, name="own", side=64):
    """A data set that folder.py makes, and what it says."""
    done = run_script("folder", "--source", root, "--name", name, "--side", side, "--out", root.parent / "out", *words)
    assert done.returncode == 0, done.stderr
    return load(name, root.parent / "out", verify=True), done.stdout


def refused(root, *words):
    """The line with which folder.py stops."""
    out = root.parent / "refused"
    done = run_script("folder", "--source", root, "--name", "own", "--side", 16, "--out", out, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(out.glob("[!.]*"))
    return done.stderr.strip().splitlines()[-1]


def classes(root, draw, ending, count=20):
    """A folder for each of the classes a and b, with the pixels `draw(number)`, or what `draw` saves itself."""
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number:02d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw(number) if draw.__code__.co_argcount == 1 else draw(number, path)
        if pixels is not None:
            Image.fromarray(pixels).save(path)
    return root


def one_pixel(pixels, number):
    """The same picture with another corner, so that no two are equal."""
    pixels = pixels.copy()
    pixels.flat[number] = pixels.flat[40]
    return pixels


DEEP = {
    "full 16 bits": ((RAMP * 65535).astype(np.uint16), "png"),
    "14 of 16 bits": ((RAMP * 16383).astype(np.uint16), "tif"),
    "12 of 16 bits": ((RAMP * 4095).astype(np.uint16), "png"),
    "10 of 16 bits": ((RAMP * 1023).astype(np.uint16), "png"),
    "brightest is 255": ((RAMP * 255).astype(np.uint16), "png"),
    "brightest is 256": ((RAMP * 256).astype(np.uint16), "png"),
    "CT numbers": ((RAMP * 4000 - 1024).astype(np.int32), "tif"),
    "floats to 1": (RAMP.astype(np.float32), "tif"),
    "floats around 0": ((RAMP * 7 - 3.5).astype(np.float32), "tif"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_deep_image_keeps_its_levels_their_order_and_its_sign(tmp_path, kind):
    pixels, ending = DEEP[kind]
    data, said = made(classes(tmp_path / "scans", lambda n: one_pixel(pixels, n), ending), "--gray")
    row = data.images[0, 40, :, 0].astype(int)
    assert abs(row - np.linspace(0, 255, 64)).max() <= 2
    assert data.card["intensity"] == [float(pixels.min()), float(pixels.max())]
    assert "images scaled to 8 bits from" in said and "grey levels left" not in said


def test_one_range_serves_all_images_so_that_brightness_gives_no_class_away(tmp_path):
    ramp = (RAMP * 250).astype(np.uint16)

    def draw(number):
        pixels = one_pixel(ramp, number)
        pixels[63, 63] = 255 + number % 2  # the brightest of class b does not fit in eight bits
        return pixels

    data, _ = made(classes(tmp_path / "scans", draw, "png"), "--gray")
    means = [data.images[data.labels == label].mean() for label in (0, 1)]
    assert abs(means[0] - means[1]) < 0.1


def test_a_deep_image_that_is_darker_than_another_stays_darker(tmp_path):
    def draw(number):
        return one_pixel((RAMP * (4080 >> number // 2 % 4)).astype(np.uint16), number)

    data, _ = made(classes(tmp_path / "scans", draw, "png", 40), "--gray", side=64)
    brightest = np.sort(data.images.max(axis=(1, 2, 3)).astype(int))
    assert abs(brightest - np.repeat([255 >> 3, 255 >> 2, 255 >> 1, 255], 10)).max() <= 1


def test_eight_bit_images_are_not_touched_and_the_card_says_nothing(tmp_path):
    ramp = (RAMP * 60).astype(np.uint8)
    data, _ = made(classes(tmp_path / "scans", lambda n: one_pixel(ramp, n), "png"), "--gray")
    assert np.array_equal(data.images[0, ..., 0], one_pixel(ramp, 0)) and "intensity" not in data.card


@pytest.mark.parametrize("ending, order", [("png", ">u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_colour_of_sixteen_bits_keeps_its_low_byte(tmp_path, ending, order):
    colours = np.stack([RAMP * 4095, RAMP[:, ::-1] * 4095, RAMP * 1000], axis=2).round().astype(np.uint16)

    def write(number, path):
        (deep_png if ending == "png" else deep_tiff)(path, one_pixel(colours, number).astype(order))

    data, said = made(classes(tmp_path / "scans", write, ending))
    assert abs(data.images[0, 40].astype(int) - colours[40] / 4095 * 255).max() <= 1
    assert data.card["intensity"] == [0, 4095] and "RGB;16 images scaled" in said


def deep_png(path, pixels):
    """Pillow writes no 16-bit colour: a PNG by hand, of 2 channels (gray, alpha), 3 or 4."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def deep_tiff(path, pixels):
    tifffile.imwrite(path, pixels, photometric="rgb", byteorder=pixels.dtype.byteorder.replace("=", "<"))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_of_sixteen_bits_with_transparency_what_is_transparent_is_black(tmp_path, channels, ending):
    path = tmp_path / f"a.{ending}"
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    values[:4, :, -1], values[4:, :, -1] = 0, 65535
    if ending == "png":
        deep_png(path, values)
    else:
        photometric = "rgb" if channels == 4 else "minisblack"
        tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig", extrasamples=["unassalpha"])
    found = pixels.read(path).values
    assert not found[:4].any() and np.array_equal(found[4:], values[4:, :, :-1].squeeze())


LAYOUTS = {
    "in planes": {"planarconfig": "separate"},
    "packed with LZW": {"compression": "lzw", "predictor": True},
    "packed with zlib, in strips": {"compression": "zlib", "rowsperstrip": 5},
    "in tiles": {"tile": (16, 16)},
    "BigTIFF": {"bigtiff": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("colour", [True, False])
def test_a_deep_tiff_of_any_layout_is_read_as_its_values_and_cut_short_it_is_an_error(tmp_path, layout, colour):
    path, options = tmp_path / "a.tif", LAYOUTS[layout]
    values = np.random.default_rng(0).integers(0, 65536, (40, 30, 3) if colour else (40, 30)).astype(np.uint16)
    if not colour:
        options = {name: value for name, value in options.items() if name != "planarconfig"}
    planes = np.moveaxis(values, -1, 0) if "planarconfig" in options else values
    tifffile.imwrite(path, planes, photometric="rgb" if colour else "minisblack", **options)
    found = pixels.read(path)
    assert np.array_equal(found.values, values) and found.kind == ("RGB;16" if colour else "I;16")
    assert pixels.extremes(path) == (values.min(), values.max())
    whole = path.read_bytes()
    for kept in (len(whole) - 20, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(Exception):  # noqa: B017  whatever the library says
            pixels.read(path)


@pytest.mark.parametrize("sort", ["int8", "int16", "uint32", "int32", "float16", "float32", "float64"])
def test_numbers_of_every_sort_keep_their_order_and_their_value(tmp_path, sort):
    low, high = (-3.5, 3.5) if sort.startswith("float") else (np.iinfo(sort).min, np.iinfo(sort).max)
    values = np.linspace(low, high, 20 * 64).reshape(20, 64).astype(sort)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert np.array_equal(pixels.read(tmp_path / "a.tif").values, values.astype(float))
    shown, notes = pixels.eight_bits(tmp_path / "a.tif", pixels.extremes(tmp_path / "a.tif"), True)
    assert abs(np.asarray(shown).astype(int).ravel() - np.linspace(0, 255, 20 * 64)).max() <= 1
    assert notes[0].startswith(f"{'F' if sort[0] == 'f' else 'I'};{values.itemsize * 8} images scaled to 8 bits")


def test_an_image_without_a_number_is_one_line_that_says_so(tmp_path):
    def write(number, path):
        tifffile.imwrite(path, np.full((20, 20), np.nan, np.float32))

    root = classes(tmp_path / "scans", write, "tif")
    for words in ((), ("--window", "percentile"), ("--range", 0, 1)):
        assert "00.tif: it holds no number but NaN and infinity; mend or remove it" in refused(root, *words)


def test_channels_that_are_no_colours_are_said(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9, 5), np.uint16), photometric="minisblack", planarconfig=1)
    with pytest.raises(ValueError, match="5 channels that are no colours"):
        pixels.read(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_deep_tiff_is_turned_as_its_tag_asks(tmp_path, orientation):
    upright = np.zeros((20, 20), np.uint16)
    upright[:5, :10] = 40000
    exif, image = Image.Exif(), Image.fromarray(upright)
    exif[274] = orientation
    image.save(tmp_path / "a.tif", exif=exif)
    prepare = partial(folder.upright_square, "pad", 1)
    found, notes = conversion._read_one(tmp_path / "a.tif", prepare, (20, 20, 1), [0, 65535], True)
    turned = folder.ImageOps.exif_transpose(Image.open(tmp_path / "a.tif"))
    assert np.array_equal(found[..., 0] > 0, np.asarray(turned) > 0)
    assert any("turned upright" in note for note in notes) == (orientation > 1)


def test_a_range_or_percentiles_can_be_asked_for(tmp_path):
    def draw(number):
        pixels = one_pixel((RAMP * 1000).astype(np.uint16), number)
        pixels[63, 63] = 60000  # a marker that is burnt in
        return pixels

    root = classes(tmp_path / "scans", draw, "png")
    data, said = made(root, "--gray", name="whole")
    assert "under 32 grey levels left" in said and "--window percentile" in said
    data, said = made(root, "--gray", "--range", 0, 500, name="range")
    assert abs(data.images[0, 40, :, 0] - (2 * np.linspace(0, 255, 64)).clip(0, 255)).max() <= 1
    assert data.card["intensity"] == [0, 500] and "grey levels left" not in said
    data, _ = made(root, "--gray", "--window", "percentile", name="each")
    assert data.card["intensity"] == "percentile" and len(np.unique(data.images[0, 40])) > 55
    assert "--range 5 5" in refused(root, "--range", 5, 5)


def test_an_image_whose_zero_is_white_is_turned_as_the_eye_expects(tmp_path):
    pixels = ((1 - RAMP) * 4095).astype(np.uint16)

    def write(number, path):
        tifffile.imwrite(path, one_pixel(pixels, number), photometric="miniswhite")

    data, _ = made(classes(tmp_path / "scans", write, "tif"), "--gray")
    assert abs(data.images[0, 40, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 2


def dicom(path, pixels, patient="", **tags):
    """A DICOM file with these pixels; `tags` are set last."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID, file.PatientID = CTImageStorage, generate_uid(), patient
    file.set_pixel_data(pixels, tags.pop("PhotometricInterpretation", "MONOCHROME2"), tags.pop("BitsStored", 16))
    for name, value in tags.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def dicom_classes(root, pixels, ending="dcm", **tags):
    def write(number, path):
        dicom(path, one_pixel(pixels, number), f"P{number // 2 if number < 16 else number}", **tags)

    return classes(root, write, ending)


def voi_table(bits):
    """A VOI LUT from 12-bit values to `bits`, rising to the middle and white above."""
    from pydicom.dataset import Dataset

    table = Dataset()
    values = (np.linspace(0, 2, 4096).clip(0, 1) * (2**bits - 1)).astype(np.uint16)
    table.LUTDescriptor, table.LUTData = [4096, 0, bits], values.tolist()
    table["LUTData"].VR = "US"
    table["LUTDescriptor"].VR = "US"
    return [table]


TWELVE = (RAMP * 4095).round().astype(np.uint16)
WHOLE, HALF = np.linspace(0, 255, 64), (2 * np.linspace(0, 255, 64)).clip(0, 255)
DICOMS = {
    "without a window": (TWELVE, {"BitsStored": 12}, WHOLE, [0, 4095]),
    "dark is high": (4095 - TWELVE, {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"}, WHOLE, [0, 4095]),
    "Hounsfield units": (TWELVE, {"RescaleSlope": 1, "RescaleIntercept": -1024}, WHOLE, [-1024, 3071]),
    "signed": ((TWELVE.astype(np.int16) - 1000), {}, WHOLE, [-1000, 3095]),
    "a window in Hounsfield units": (
        TWELVE,
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 0, "WindowWidth": 2048},
        HALF,
        "the window of each file",
    ),
    "several windows": (
        TWELVE,
        {"WindowCenter": [1024, 40], "WindowWidth": [2048, 80]},
        HALF,
        "the window of each file",
    ),
    "dark is high, and a window": (
        4095 - TWELVE,
        {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 3072, "WindowWidth": 2048},
        HALF,
        "the window of each file",
    ),
    "a VOI table": (TWELVE, {"BitsStored": 12, "VOILUTSequence": voi_table(16)}, HALF, "the window of each file"),
    "a VOI table of 8 bits": (
        TWELVE,
        {"BitsStored": 12, "VOILUTSequence": voi_table(8)},
        HALF,
        "the window of each file",
    ),
}


@pytest.mark.parametrize("kind", DICOMS)
def test_dicom_is_shown_as_a_viewer_shows_it(tmp_path, kind):
    pixels, tags, wanted, intensity = DICOMS[kind]
    data, said = made(dicom_classes(tmp_path / "scans", pixels, **tags), "--gray")
    assert abs(data.images[0, 40, :, 0].astype(float) - wanted).max() <= 2
    assert data.card["intensity"] == intensity and "no patients are known" not in said
    assert sorted(set(data.patients)) == sorted({f"P{n // 2 if n < 16 else n}" for n in range(20)})


def test_dicom_in_colour_or_eight_bits_is_as_it_is_and_a_range_takes_the_place_of_its_window(tmp_path):
    colours = np.stack([RAMP, RAMP[:, ::-1], RAMP / 3], axis=2)
    colours = (colours * 255).astype(np.uint8)
    tags = {"BitsStored": 8, "PhotometricInterpretation": "RGB"}
    data, _ = made(dicom_classes(tmp_path / "colour", colours, **tags), name="colour")
    assert np.array_equal(data.images[0, 40], colours[40]) and "intensity" not in data.card
    dim = (RAMP * 90).astype(np.uint8)
    data, _ = made(dicom_classes(tmp_path / "dim", dim, BitsStored=8), "--gray", name="dim")
    assert np.array_equal(data.images[0, 40, :, 0], dim[40])
    root = dicom_classes(tmp_path / "window", TWELVE, WindowCenter=40, WindowWidth=80)
    data, _ = made(root, "--gray", "--range", 0, 4095, name="window")
    assert abs(data.images[0, 40, :, 0] - WHOLE).max() <= 1
    half = dicom_classes(tmp_path / "half", TWELVE, WindowCenter=40)
    data, _ = made(half, "--gray", name="half")
    assert data.card["intensity"] == [0, 4095], "a window without a width is none"


@pytest.mark.parametrize("kind", ["dcm", "tif"])
@pytest.mark.parametrize("words", [(), ("--range", 0, 4000), ("--window", "percentile")])
def test_where_dark_is_high_a_range_is_of_the_values_in_the_file(tmp_path, kind, words):
    """Half of the files count the other way round, in 16 bits of which 4,000 are used."""
    pixels = (RAMP * 4000).round().astype(np.uint16)

    def write(number, path):
        dark_is_high = number % 4 > 1
        shown = one_pixel(4000 - pixels if dark_is_high else pixels, number)
        if kind == "tif":
            tifffile.imwrite(path, shown, photometric="miniswhite" if dark_is_high else "minisblack")
        else:
            dicom(path, shown, f"P{number}", PhotometricInterpretation=f"MONOCHROME{1 if dark_is_high else 2}")

    data, said = made(classes(tmp_path / "scans", write, kind), "--gray", *words)
    assert len(data.images) == 20 and "under 32 grey levels" not in said
    assert abs(data.images[:, 40, :, 0].astype(float) - WHOLE).max() <= (5 if "percentile" in words else 1)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(range(256)) * 4, "cut"])
def test_a_dicom_file_that_is_none_is_skipped_or_named(tmp_path, content):
    root = dicom_classes(tmp_path / "scans", TWELVE)
    whole = (root / "a" / "00.dcm").read_bytes()
    (root / "a" / "bad.dcm").write_bytes(whole[:100] if content == "cut" else content)
    assert "a/bad.dcm" in refused(root, "--gray")
    data, said = made(root, "--gray", "--skip-bad")
    assert len(data.images) == 20 and "skipped" in said and "a/bad.dcm" in said


@pytest.mark.parametrize("name", ["IM{:04d}", "1.2.840.{}"])
def test_dicom_files_without_an_ending_are_found_and_a_pattern_may_name_the_patient(tmp_path, name):
    for number in range(20):
        dicom(tmp_path / "scans" / "ab"[number % 2] / name.format(number), one_pixel(TWELVE, number), "anonymous")
    (tmp_path / "scans" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert "no image is in the" in refused(tmp_path / "scans")
    data, said = made(tmp_path / "scans", "--gray", "--patient-regex", r"(\d+)$")
    assert len(data.images) == 20 and len(set(data.patients)) == 20
    assert "files left out: 1 no ending" in said


def test_a_study_of_several_patients_is_said_unless_patients_are_told_otherwise(tmp_path):
    for number in range(40):  # four series, whose slices are numbered in the tag for the patient
        tags = {"StudyInstanceUID": f"1.2.{number // 10}", "BitsStored": 12}
        pixels = one_pixel(TWELVE, number)
        dicom(tmp_path / "scans" / "ab"[number // 10 % 2] / f"S{number // 4}_{number}.dcm", pixels, f"{number}", **tags)
    said = made(tmp_path / "scans", "--gray", name="own_tags")[1]
    assert "warning: the DICOM study 1.2.0 has the patients '0' and '1'" in said and "--patient-regex" in said
    assert "warning: the" not in made(tmp_path / "scans", "--gray", "--patient-regex", r"(S\d)_", name="names")[1]


CANNOT = {
    "it holds 3 frames; save the one you mean": lambda path: dicom(path, np.stack([TWELVE] * 3), "P9"),
    "which cannot be read; pip install 'pylibjpeg[all]'": lambda path: packed_dicom(path),
    "it holds no DICOM image": lambda path: path.write_bytes(bytes(128) + b"DICM"),
}


@pytest.mark.parametrize("said", CANNOT)
def test_what_a_dicom_file_cannot_give_is_one_line_that_names_it(tmp_path, said):
    root = dicom_classes(tmp_path / "scans", TWELVE)
    CANNOT[said](root / "a" / "bad.dcm")
    line = refused(root)
    assert said in line and "bad.dcm" in line and "--skip-bad" in line
    assert len(made(root, "--skip-bad")[0].images) == 20


def packed_dicom(path):
    """A file that says JPEG-LS, for which no decoder is installed."""
    from pydicom import dcmread
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLSLossless

    dicom(path, TWELVE, "P9")
    file = dcmread(path)
    file.PixelData = encapsulate([b"\xff\xd8\xff\xf7" + bytes(60)])
    file["PixelData"].is_undefined_length = True
    file.file_meta.TransferSyntaxUID = JPEGLSLossless
    file.save_as(path)


@pytest.mark.parametrize("name, said", [("a.nii.gz", "nibabel"), ("b.svs", "OpenSlide"), ("c.HEIC", "as JPEG")])
def test_volumes_and_whole_slides_are_told_what_to_convert_with(tmp_path, name, said):
    root = tmp_path / "scans"
    for letter in "ab":
        (root / letter).mkdir(parents=True)
        (root / letter / name).write_bytes(b"x")
    assert said in refused(root) and name in refused(root)
    classes(root, lambda n: one_pixel((RAMP * 60).astype(np.uint8), n), "png")
    _, text = made(root)
    assert said in text and f"files left out: 2 .{name.lower().rpartition('.')[2]}" in text


def test_files_that_are_not_read_are_counted_by_ending(tmp_path):
    root = classes(tmp_path / "scans", lambda n: one_pixel((RAMP * 60).astype(np.uint8), n), "png")
    for number in range(3):
        Image.fromarray((RAMP * 60).astype(np.uint8)).save(root / "a" / f"{number}.gif")
    (root / "notes.txt").write_text("x")
    data, said = made(root)
    assert "files left out: 3 .gif, 1 .txt" in said and data.card["report"]["left_out"] == {".gif": 3, ".txt": 1}


def test_folders_that_are_not_looked_into_are_counted(tmp_path, monkeypatch):
    root = classes(tmp_path / "scans", lambda n: one_pixel((RAMP * 60).astype(np.uint8), n), "png")
    (root / "a" / "more").symlink_to(root / "b", target_is_directory=True)
    assert "files left out: 1 links to folders" in made(root)[1]
    (root / "a" / "closed").mkdir()
    monkeypatch.setattr(folder.os, "access", lambda path, wanted: path.name != "closed")
    found = {"links to folders": 1, "folders without permission to read": 1}
    assert folder.left_out(root, [], None) == found | {".png": 20}
    (root / "c").symlink_to(root / "b", target_is_directory=True)
    assert "scans/c is a link to a folder, which is not followed; put the folder itself there" in refused(root)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_stand_as_their_exif_data_ask(tmp_path, ending):
    upright = np.full((48, 40), 30, np.uint8)
    upright[:20, :20] = 220
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turns |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM}

    def write(number, path):
        tag = list(turns)[number // 2 % len(turns)]
        image = Image.fromarray(one_pixel(upright, 25 + number))
        exif = Image.Exif()
        exif[274] = tag
        (image.transpose(turns[tag]) if turns[tag] is not None else image).save(path, exif=exif)

    data, said = made(classes(tmp_path / "scans", write, ending, 24), "--gray", side=24)
    top_left, others = data.images[:, 2:8, 4:10].mean(axis=(1, 2, 3)), data.images[:, 14:22, 4:20]
    assert (top_left > 190).all() and others.mean() < 50
    assert ending == "tif" or "turned upright, as EXIF asks: 20" in said


def disc(number, width=60):
    """A circle on a black image, 60 high."""
    y, x = np.mgrid[:60, :width]
    pixels = np.where((x - width / 2) ** 2 + (y - 30) ** 2 < 22**2, 200 + number, 20)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("words", [(), ("--crop",), ("--stretch",)])
def test_a_circle_stays_round_unless_stretching_is_asked_for(tmp_path, words):
    root = classes(tmp_path / "scans", lambda n: disc(n, 150 if n % 2 else 60), "png")
    data, said = made(root, "--gray", *words)
    rows, columns = (data.images[data.labels == 1][0, ..., 0] > 120).nonzero()
    assert (abs(np.ptp(rows) - np.ptp(columns)) <= 1) == (words != ("--stretch",))
    assert data.card["report"]["not_square"] == {"a": [0, 10], "b": [10, 10]}
    assert "not square: a 0 of 10, b 10 of 10" in said and "gives its class away" in said
    assert any(f"{way} to a square: 10" in said for way in ("padded", "cropped", "stretched"))


def test_shape_that_both_classes_share_is_counted_and_not_warned_of(tmp_path):
    data, said = made(classes(tmp_path / "scans", lambda n: disc(n, 150 if n < 8 else 60), "png"), "--gray")
    assert data.card["report"]["not_square"] == {"a": [4, 10], "b": [4, 10]} and "gives its class away" not in said


@pytest.fixture
def table(tmp_path):
    """A function that writes 60 images and a table of them, each row changed by `change`; returns the words for it."""
    rng = np.random.default_rng(1)
    for number in range(60):
        path = tmp_path / "scans" / "in" / f"im{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(path)

    def write(change=lambda number, *row: row, encoding="utf-8", separator=",", more=(), columns=()):
        rows = [("file", "label", "patient", "fold", *columns)]
        for number in range(60):
            fold = ("train", "train", "val", "test")[number // 3 % 4]
            row = (f"in/im{number:02d}.png", ("benign", "malignant")[number % 2], f"P{number // 3:02d}", fold)
            rows.append(change(number, *row))
        lines = [separator.join(row) for row in [*rows, *more]]
        (tmp_path / "table.csv").write_text("\r\n".join(lines) + "\r\n", encoding=encoding, newline="")
        return tmp_path / "scans", "--csv", tmp_path / "table.csv", "--label", "label", "--patient", "patient"

    return write


HARMLESS = {
    "as it should be": {},
    "blanks around cells": {"change": lambda n, f, c, p, s: (f, f" {c} " if n % 3 else c, p + " " * (n % 2), s)},
    "a mark of byte order": {"encoding": "utf-8-sig"},
    "paths of Windows": {"change": lambda n, f, c, p, s: (f.replace("/", "\\"), c, p, s)},
    "empty rows as Excel leaves them": {"more": [("", "", "", ""), ("", "", "", "")]},
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_table_that_can_only_mean_one_thing_is_read(table, kind):
    data, _ = made(*table(**HARMLESS[kind]))
    assert data.classes == ["benign", "malignant"] and len(set(data.patients)) == 20 and len(data.images) == 60


def some(number):
    return number % 3 == 0


SLIPS = {
    "class in capitals": (
        {"change": lambda n, f, c, p, s: (f, c.title() if some(n) else c, p, s)},
        "classes 'Benign' and 'benign'",
    ),
    "class with a zero behind": (
        {"change": lambda n, f, c, p, s: (f, f"{n % 2}" + ".0" * some(n), p, s)},
        "classes '0.0' and '0'",
    ),
    "class with a blank inside": (
        {"change": lambda n, f, c, p, s: (f, "no  tumour" if some(n) else "no tumour" if n % 2 else "tumour", p, s)},
        "classes 'no  tumour' and 'no tumour'",
    ),
    "patient in small letters": (
        {"change": lambda n, f, c, p, s: (f, c, p.lower() if some(n) else p, s)},
        "patients 'P00' and 'p00'",
    ),
    "patient without its zeros": (
        {"change": lambda n, f, c, p, s: (f, c, str(int(p[1:])) if some(n) else p[1:], s)},
        "patients '0' and '00'",
    ),
    "patient as a decimal": (
        {"change": lambda n, f, c, p, s: (f, c, p[1:].lstrip("0") + "1" + ".0" * some(n), s)},
        "patients '1' and '1.0'",
    ),
    **{
        f"{word!r} for no label": (
            {"change": lambda n, f, c, p, s, word=word: (f, word if n % 7 == 0 else c, p, s)},
            "no label for 9 images, for example 'in/im00.png'",
        )
        for word in ("", "NaN", "NA", "n/a", " ")
    },
    "-1 for uncertain": (
        {"change": lambda n, f, c, p, s: (f, "-1" if n % 6 == 0 else str(n % 2), p, s)},
        "-1 in 10 cells beside 0",
    ),
    "a file twice": ({"more": [("in/im00.png", "malignant", "P00", "train")]}, "'in/im00.png' is listed twice"),
    "a file of two patients": ({"more": [("in/im00.png", "benign", "P01", "train")]}, "'in/im00.png' is listed twice"),
    "UTF-16": ({"encoding": "utf-16"}, "export it as UTF-8 with commas"),
    "cp1252": (
        {"encoding": "cp1252", "change": lambda n, f, c, p, s: (f, c, "Müller " + p, s)},
        "export it as UTF-8 with commas",
    ),
    "semicolons": ({"separator": ";"}, "export it as UTF-8 with commas"),
    "tabs": ({"separator": "\t"}, "export it as UTF-8 with commas"),
    "a comma in a cell": (
        {"change": lambda n, f, c, p, s: (f, "mild, old" if n == 12 else c, p, s)},
        "Expected 4 fields in line 14, saw 5; put cells that hold a comma in quotes",
    ),
    "empty cells behind": (
        {"change": lambda n, *row: (*row, "", "") if n % 2 else row},
        "Expected 4 fields in line 3, saw 6; put cells that hold a comma in quotes, and remove empty ones",
    ),
    "two columns of one name": (
        {"change": lambda n, *row: (*row, "P1"), "columns": ["patient"]},
        "has 2 columns 'patient'",
    ),
    "patients that Excel has rounded": (
        {"change": lambda n, f, c, p, s: (f, c, f"1.2345{n % 10}E+11", s)},
        "'1.23450E+11' is a long number that a spreadsheet has rounded",
    ),
    "whole paths of Windows": (
        {"change": lambda n, f, c, p, s: ("C:\\Data\\scans\\" + f.replace("/", "\\"), c, p, s)},
        "is not under",
    ),
    "a path out of the folder": (
        {"change": lambda n, f, c, p, s: ("..\\..\\secret.png" if n == 5 else f, c, p, s)},
        "leads out of",
    ),
}


@pytest.mark.parametrize("kind", SLIPS)
def test_a_table_that_could_mean_two_things_is_refused_and_both_are_named(table, kind):
    words, said = SLIPS[kind]
    assert said in refused(*table(**words))


@pytest.mark.parametrize("words", [("0", "1"), ("0.0", "1.0"), ("False", "True")])
def test_columns_of_several_labels_may_say_yes_in_the_ways_that_programs_write_it(table, words):
    change = lambda n, f, c, p, s: (f, words[n % 2] if n % 3 else "1", p, s, words[n % 2])  # noqa: E731
    *given, _, _ = table(change, columns=["more"])
    data, _ = made(*given, "more", "--patient", "patient")
    assert data.task == "multilabel" and data.labels[:, 1].tolist() == [n % 2 for n in range(60)]


def test_a_column_of_measurements_taken_for_labels_is_said(table):
    _, said = made(*table(lambda n, f, c, p, s: (f, f"{20 + n / 10:g}", p, s)))
    assert "warning: 60 classes of 60 images: are these labels?" in said


def test_images_without_a_label_may_be_said_to_be_unlabelled(table):
    def change(number, file, label, patient, fold):
        return (file, "NA", patient, "unlabelled") if patient in ("P00", "P04") else (file, label, patient, fold)

    data, _ = made(*table(change), "--split", "fold")
    assert len(data.rows("unlabelled")) == 6 and data.classes == ["benign", "malignant"]


@pytest.mark.parametrize(
    "words", [("-1", "1"), ("-2", "-1"), ("I", "II"), ("1.0", "1.5"), ("10", "100"), ("1.2", "12")]
)
def test_names_that_truly_differ_are_classes_and_patients(table, words):
    patients = ("1.2.840.10", "1.2.840.1")
    change = lambda n, f, c, p, s: (f, words[n % 2], f"{patients[n // 3 % 2]}.{n // 3 + 1}", s)  # noqa: E731
    data, _ = made(*table(change))
    assert sorted(data.classes) == sorted(words) and len(set(data.patients)) == 20


def test_a_file_that_is_listed_twice_in_the_same_way_is_read_as_before(table):
    assert len(made(*table(more=[("in/im00.png", "benign", "P00", "train")]))[0].images) in (60, 61)


def test_class_folders_that_differ_only_by_case_are_named(tmp_path):
    for part, names in (("train", ("Normal", "tumour")), ("test", ("normal", "tumour"))):
        for name in names:
            for number in range(8):
                path = tmp_path / "scans" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(one_pixel((RAMP * 60).astype(np.uint8), number)).save(path)
    assert "classes 'Normal' and 'normal'" in refused(tmp_path / "scans")


def split_tree(root):
    """Split folders with the classes a and b, every picture another."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6), ("test", 8), ("unlabelled", 4)):
        for number in range(count):
            path = root / part / "ab"[number % 2] / f"{part}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path)
    return root


def test_of_copies_in_several_splits_the_held_out_one_stays_and_other_labels_are_said(tmp_path):
    root = split_tree(tmp_path / "scans")
    whole, _ = made(root, "--gray", side=16, name="whole")
    for source, copy in (
        ("test/a/test0", "train/a/copy"),
        ("test/a/test2", "val/a/copy"),
        ("test/b/test1", "unlabelled/b/copy"),
        ("val/b/val1", "train/b/copy"),
        ("train/b/train1", "unlabelled/b/more"),
        ("test/a/test4", "train/b/other"),
    ):
        (root / f"{copy}.png").write_bytes((root / f"{source}.png").read_bytes())
    data, said = made(root, "--gray", side=16)
    assert data.card["counts"] == whole.card["counts"] and data.card["report"]["copies_left_out"] == 6
    assert {x.tobytes() for x in data.images} == {x.tobytes() for x in whole.images}
    assert "1 equal pictures have different labels, for example" in said and "other.png" in said


def test_near_equal_pictures_in_two_splits_are_counted_and_shown(tmp_path):
    root = split_tree(tmp_path / "scans")
    whole, said = made(root, "--gray", side=16, name="whole")
    assert "near-equal pairs: none found" in said and whole.card["report"]["near_copies"] == {}
    pixels = np.asarray(Image.open(root / "test/a/test0.png"))
    Image.fromarray((pixels * 0.95).astype(np.uint8)).save(root / "train/a/again.png")
    data, said = made(root, "--gray", side=16)
    assert "near-equal pairs: 1 train and test" in said and data.card["report"]["near_copies"] == {"train and test": 1}
    drawn = np.asarray(Image.open(tmp_path / "out" / "own" / "contact_sheet.png").convert("L"))
    assert (drawn[:, :2] == 255).all(), "no name of a row is cut off"
    pairs = np.array([np.flatnonzero([np.abs(x.astype(float) - pixels[..., None]).mean() < 8 for x in data.images])])
    sheet = common.contact_sheet(data, pairs)
    assert sheet.axes[0].get_yticklabels()[0].get_text().startswith("near-equal pairs")


def test_people_with_an_equal_picture_are_one_patient_and_what_many_share_ties_no_one(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (16, 16)).astype(np.uint8) for _ in range(40)]
    pixels[4] = pixels[2]  # P1 and P2
    pixels[7] = pixels[5]  # P2 and P3
    for number in (20, 22, 24, 26):
        pixels[number] = np.zeros((16, 16), np.uint8)
    for number in range(30, 40, 2):
        pixels[number] = pixels[28]  # the same placeholder for five people
    for number, image in enumerate(pixels):
        path = tmp_path / "scans" / "ab"[number // 2 % 2] / f"P{number // 2}_{number % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    data, _ = made(tmp_path / "scans", "--gray", "--patient-regex", r"(P\d+)_", side=16)
    names, counts = np.unique(data.patients, return_counts=True)
    assert counts.max() == 6 and names[counts.argmax()] == "P1" and len(names) > 8


def finding(number, side=96):
    """0..1: an oval with a bright spot at its top where the number is odd, on a ground that brightens downwards."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, : side * 3 // 4] / side - 0.5
    x = x + 0.125
    pixels = 0.15 + 0.2 * (y + 0.5) + 0.3 * (x**2 / 0.09 + y**2 / 0.2 < 1) + rng.normal(0, 0.02, x.shape)
    middle, spot = rng.uniform(-0.1, 0.1), number % 2
    return (pixels + spot * 0.4 * np.exp(-((x - middle) ** 2 + (y + 0.25) ** 2) / 0.006)).clip(0, 1)


def test_dicom_deep_png_and_turned_jpeg_with_a_table_of_excel_become_an_encoder_and_an_auc(tmp_path):
    from mocolayers.evaluation.judge import judge
    from mocolayers.recipe import EVALUATIONS, preset
    from mocolayers.training.pretrain import pretrain

    root, rows = tmp_path / "hospital", ["file,finding,patient"]
    (root / "images").mkdir(parents=True)
    for number in range(90):
        pixels, kind = finding(number), number // 2 % 3
        name = f"images/{number:03d}" + (".dcm", ".png", ".jpg")[kind]
        if kind == 0:
            values = ((1 - pixels) * 4095).astype(np.uint16)
            window = {"WindowCenter": 2048, "WindowWidth": 4096, "PhotometricInterpretation": "MONOCHROME1"}
            dicom(root / name, values, "anonymous", BitsStored=12, **window)
        elif kind == 1:
            Image.fromarray((pixels * 4095).astype(np.uint16)).save(root / name)
        else:
            exif = Image.Exif()
            exif[274] = 6
            turned = Image.fromarray((pixels * 255).astype(np.uint8)).transpose(Image.Transpose.ROTATE_90)
            turned.save(root / name, exif=exif, quality=95)
        label = "spot " if number % 2 else "none"
        rows.append(f"{name.replace('/', chr(92))},{label},P{number // 2:02d}")
    (root / "table.csv").write_text("\r\n".join([*rows, ",,"]) + "\r\n", encoding="utf-8-sig", newline="")
    words = ("--csv", root / "table.csv", "--label", "finding", "--patient", "patient", "--gray")
    data, said = made(root, *words, "--title", "Three ways to keep an image", side=28)
    assert "DICOM images scaled to 8 bits from their own window: 30" in said and "I;16 images scaled" in said
    assert "turned upright, as EXIF asks: 30" in said and "padded to a square: 90" in said
    assert data.card["report"]["not_square"] == {"none": [45, 45], "spot": [45, 45]}
    shown, wanted = data.images[..., 0].astype(float), [finding(number) for number in range(90)]
    wanted = np.stack([np.pad(pixels, ((0, 0), (12, 12))) for pixels in wanted])
    close = [
        np.corrcoef(image.ravel(), np.asarray(Image.fromarray((x * 255).astype(np.uint8)).resize((28, 28))).ravel())
        for image, x in zip(shown, wanted, strict=True)
    ]
    assert min(each[0, 1] for each in close) > 0.97, "all three kinds are the same kind of picture"
    recipe = preset("smoke", "moco", data, steps=40, batch=16, queue=32)
    run = pretrain(recipe, data, tmp_path / "runs", device="cpu", progress=False)
    row = judge(run, data, EVALUATIONS["smoke"], 1.0, device="cpu")
    assert run.finished and 0.5 < row["auc"] <= 1


def plain(root):
    return classes(root, lambda n: one_pixel((RAMP * 60).astype(np.uint8), n), "png")


WORDS = {
    ("--side", "-5"): "--side -5: give 8 or more",
    ("--side", "1"): "--side 1: give 8 or more",
    ("--seed", "-1"): "--seed -1: give 0 or more",
    ("--patient-regex", "("): "unterminated subpattern at position 0; write it like '(P[0-9]+)_'",
    ("--patient-regex", "(0[0-4])?"): "finds no group in",
}


@pytest.mark.parametrize("words", WORDS)
def test_an_option_that_means_nothing_is_one_line(tmp_path, words):
    assert WORDS[words] in refused(plain(tmp_path / "scans"), *words)


def test_a_table_without_rows_is_one_line(table):
    scans, _, file, *words = table()
    file.write_text("file,label,patient,fold\n")
    assert "has a header and no rows" in refused(scans, "--csv", file, *words)


def test_a_link_that_leads_nowhere_is_named_or_skipped(tmp_path):
    root = plain(tmp_path / "scans")
    (root / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert "lost.png" in refused(root) and "--skip-bad" in refused(root)
    data, said = made(root, "--skip-bad")
    assert len(data.images) == 20 and "lost.png" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names of files in Unicode")
def test_names_in_no_known_encoding_are_read_and_told(tmp_path):
    root = plain(tmp_path / "scans")
    strange = os.fsencode(root) + b"/M\xfcller"
    (root / "b").rename(os.fsdecode(strange))
    with open(strange + b"/\xe4.png", "wb"):
        pass
    data, said = made(root, "--skip-bad")
    assert len(data.images) == 20 and data.classes == ["M\N{REPLACEMENT CHARACTER}ller", "a"] and "skipped" in said
    assert (root.parent / "out/own/contact_sheet.png").is_file()


def test_a_dollar_in_the_name_of_a_class_is_no_formula(tmp_path):
    root = plain(tmp_path / "scans")
    (root / "a").rename(root / "$\\frac{$")
    assert "$\\frac{$" in made(root)[0].classes and (root.parent / "out/own/contact_sheet.png").is_file()


def test_names_with_line_breaks_quotes_and_emoji_are_one_line(tmp_path):
    root = plain(tmp_path / "scans")
    (root / "a").rename(root / '\N{SKULL} \'a\n"1"')
    Image.fromarray(one_pixel((RAMP * 60).astype(np.uint8), 30)).save(root / "b" / "new\nline, %s {x}.png")
    data, said = made(root)
    assert len(data.images) == 21 and data.classes == ["b", '\N{SKULL} \'a\N{REPLACEMENT CHARACTER}"1"']
    (root / "b" / "bro\nken.png").write_bytes(b"x")
    line = refused(root)
    assert line.startswith("error: ") and "ken.png" in line


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
@pytest.mark.parametrize("words", [(), ("--gray",)])
def test_what_is_transparent_is_black_in_gray_as_in_colour(tmp_path, mode, words):
    def write(number, path):
        if mode == "P":
            image = Image.fromarray(one_pixel(np.kron([[0, 1], [1, 1]], np.ones((32, 32))).astype(np.uint8), number))
            image.putpalette([250, 250, 250, 240, 240, 240])
            return image.save(path, transparency=0)
        pixels = np.full((64, 64), 240, np.uint8)
        pixels[63, number] = 0
        image = Image.fromarray(pixels).convert(mode)
        image.putalpha(Image.fromarray(np.kron([[0, 1], [1, 1]], np.full((32, 32), 255)).astype(np.uint8)))
        image.save(path)

    data, _ = made(classes(tmp_path / "scans", write, "png"), *words)
    assert (data.images[:, 20:30, 20:30] == 0).all() and (data.images[:, 40:60, 40:] == 240).all()


def test_a_split_of_nothing_but_copies_is_refused(tmp_path):
    root = split_tree(tmp_path / "scans")
    for path in (root / "val").rglob("*.png"):
        path.write_bytes((root / "test" / path.parent.name / f"test{path.stem[3:]}.png").read_bytes())
    assert "error: no val image is left: all were copies of pictures in another split" in refused(root)


def test_of_a_stack_the_first_page_is_taken_and_that_is_said(tmp_path):
    def write(number, path):
        pages = [Image.fromarray(one_pixel((RAMP * top).astype(np.uint8), number)) for top in (60, 250)]
        pages[0].save(path, save_all=True, append_images=pages[1:])

    data, said = made(classes(tmp_path / "scans", write, "tif"), "--gray")
    assert data.images.max() == 60 and "first of several pages or frames taken: 20" in said


def test_a_large_slide_is_read_and_a_larger_one_is_told_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "slide.png"
    Image.new("1", (14_000, 14_000)).save(path)
    assert pixels.read(path).size == (14_000, 14_000)
    monkeypatch.setattr(pixels, "LARGEST", 10_000**2)
    with pytest.raises(ValueError, match="14000 x 14000 pixels, .* save tiles of it"):
        pixels.read(path)


@pytest.mark.parametrize("count, said", [(1, "the same label"), (2, "in the val split")])
def test_a_set_of_which_nothing_can_be_learnt_or_measured_is_one_line(count, said):
    labels, split = np.arange(12) % count, np.array([0] * 6 + [2 - (count == 1)] * 3 + [2] * 3)
    with pytest.raises(DatasetError, match=said):
        common.check_splits(labels, split)
    common.check_splits(np.arange(12) % 2, np.arange(12) % 3)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), max_size=8)


@MANY
@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6))
def test_any_table_in_csv_is_read_as_its_cells_without_blanks_around_them(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "label", "patient"), *rows])
    wanted = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not wanted:
        with pytest.raises(DatasetError, match="no rows"):
            sources.read_table(path, ["file"])
    else:
        assert sources.read_table(path, ["file"]).to_numpy().tolist() == wanted


@MANY
@given(content=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_for_a_table_are_read_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(content)
    try:
        sources.read_table(path, [])
    except DatasetError as error:
        assert "bytes.csv" in str(error)


@MANY
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]),
    shape=st.sampled_from(["pad", "crop", "stretch"]),
    channels=st.sampled_from([1, 3]),
    orientation=st.integers(1, 8),
    level=st.integers(0, 255),
)
def test_an_image_of_any_shape_and_mode_becomes_a_square_of_its_brightness(
    tmp_path_factory, size, mode, shape, channels, orientation, level
):
    path = tmp_path_factory.getbasetemp() / "any.tif"
    image = Image.new("L", size, level)
    if mode in ("I;16", "I", "F"):
        values = np.full(size[::-1], level, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        image = Image.fromarray(values)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)
    prepare = partial(folder.upright_square, shape, channels)
    array, _ = conversion._read_one(path, prepare, (16, 16, channels), [0, 255], True)
    assert array.shape == (16, 16, channels) and array.dtype == np.uint8
    if mode != "1" and shape != "pad":
        assert abs(array.astype(int) - level).max() <= 6
    disc, _ = conversion._read_one(path, retina.crop_to_disc, (16, 16, 3), [0, 255], True)
    assert disc.shape == (16, 16, 3)


@MANY
@given(
    people=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_any_split_keeps_patients_whole_and_no_picture_on_two_sides(people, seed):
    patients, positive, picture = (np.array(each) for each in zip(*people, strict=True))
    split = common.split_by_patient(patients, positive, seed)
    assert all(len(set(split[patients == name])) == 1 for name in set(patients))
    assert np.array_equal(split, common.split_by_patient(patients, positive, seed))
    images = np.broadcast_to(picture[:, None, None, None], (len(people), 4, 4, 1)).astype(np.uint8)
    rows = copies.rows_without_copies(copies.pixel_hashes(images), split)
    assert set(picture[rows]) == set(picture)
    assert all(len(set(split[rows][picture[rows] == kind])) == 1 for kind in set(picture))


class Outcomes:
    """A pytest plugin: what happened to each kind of input."""

    def __init__(self):
        self.rows = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            name = report.nodeid.partition("::test_")[2].replace("_", " ")
            self.rows.append((name, "as claimed" if report.passed else report.outcome.upper()))


if __name__ == "__main__":
    outcomes = Outcomes()
    code = pytest.main([__file__, *sys.argv[1:]], plugins=[outcomes])
    for kind, outcome in outcomes.rows:
        print(f"{outcome:12}{kind}")
    sys.exit(code)
