"""Claims about images and tables as researchers have them: each comes out right, or stops with one clear line."""

import numpy as np
import pytest
from PIL import Image
from test_data_scripts import run_script

from mocolayers.data.prepared import load

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
    """Pillow writes no 16-bit colour: a PNG by hand."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def deep_tiff(path, pixels):
    import tifffile

    tifffile.imwrite(path, pixels, photometric="rgb", byteorder=pixels.dtype.byteorder.replace("=", "<"))


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
    import tifffile

    pixels = ((1 - RAMP) * 4095).astype(np.uint16)

    def write(number, path):
        tifffile.imwrite(path, one_pixel(pixels, number), photometric="miniswhite")

    data, _ = made(classes(tmp_path / "scans", write, "tif"), "--gray")
    assert abs(data.images[0, 40, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 2
