"""One image file to eight bits: ordinary images are left as they are, deeper ones are scaled from a known range."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

ORIENTATION = 274  # the EXIF tag, which is TIFF's as well
FEW = 32  # grey levels of 256
PERCENTILES = (1, 99)
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins
DICOM = (".dcm", ".dicom")
SLICES = "a volume; save its slices as PNG or TIFF, for example with nibabel (pip install nibabel)"
TILES = "a whole slide; save tiles of it, for example with OpenSlide (pip install openslide-python openslide-bin)"
CONVERT = {".heic": "a photograph as phones save it; export it as JPEG or PNG"}
CONVERT |= dict.fromkeys((".nii", ".nrrd", ".mha"), SLICES) | dict.fromkeys((".svs", ".ndpi", ".mrxs", ".scn"), TILES)
LARGEST = 2**28  # pixels of an image, about 16,000 x 16,000: 0.8 GB in colour, once for each process
PAGES = "first of several pages or frames taken"
LOST = "warning: images with under 32 grey levels left; try --window percentile or --range LOW HIGH"

Image.MAX_IMAGE_PIXELS = None  # LARGEST takes its place
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is told once, as an error


class Deep(NamedTuple):
    """An image of more than eight bits.

    Attributes:
        values: (H, W) or (H, W, 3) float64, as in the file.
        kind: what the file is, for the note.
        info: as Pillow has it, with the orientation and our notes.
        limits: what is black and white, where the file says so.
        dark_is_high: the highest value is black.
    """

    values: np.ndarray
    kind: str
    info: dict
    limits: tuple[float, float] | None = None
    dark_is_high: bool = False


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or its first bytes."""
    if path.suffix.lower() in DICOM:
        return True
    with suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"
    return False


def convert_with(path: Path) -> str | None:
    """What to do with a file of another kind that is often met, e.g. NIfTI; None for others."""
    return CONVERT.get(path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower())


def read(path: Path, deep_only: bool = False, windowed: bool = True) -> Image.Image | Deep | None:
    """The image of a file at its own depth; with `deep_only` None, quickly, for eight bits or a window of its own."""
    if advice := convert_with(path):
        raise ValueError(f"it is {advice}")
    if is_dicom(path):
        return _dicom(path, deep_only, windowed)
    # Opened as a stream: Pillow garbles a turned TIFF that it maps into memory by name.
    with open(path, "rb") as stream:
        head = stream.read(26)
        if head.startswith(TIFF) and (deep := _tiff(path)):
            return deep
        with Image.open(stream) as image:
            check_size(image.width, image.height)
            if getattr(image, "n_frames", 1) > 1:
                image.info["notes"] = [PAGES]
                image.seek(0)
            if image.format == "PNG" and head[24] == 16 and image.mode != "I;16":
                return _deep_png(path, image)
            if image.mode.startswith("I"):
                return Deep(np.asarray(image, np.float64), image.mode, image.info)
            if not deep_only:
                image.load()
                return image
    return None


def check_size(width: int, height: int) -> None:
    """Refuse an image that does not fit into the memory of every process that reads."""
    if width * height > LARGEST:
        raise ValueError(f"it has {width} x {height} pixels, too many to read at once; it is {TILES}")


def _tiff(path: Path) -> Deep | None:
    """A TIFF of more than eight bits, or of signed ones; None for one that Pillow reads as it is."""
    from tifffile import EXTRASAMPLE, PHOTOMETRIC, SAMPLEFORMAT, TiffFile

    try:
        with TiffFile(path) as file:
            if not len(file.pages):
                return None
            page, several = file.pages[0], len(file.pages) > 1
            bits, sort, kind = page.bitspersample, page.sampleformat, page.photometric
            if (bits <= 8 and sort != SAMPLEFORMAT.INT) or kind == PHOTOMETRIC.SEPARATED:
                return None
            if sort > SAMPLEFORMAT.IEEEFP or kind > PHOTOMETRIC.RGB:
                raise ValueError(f"it is a TIFF of {bits} bits in {kind.name}, {sort.name}; save it as RGB or gray")
            check_size(page.imagewidth, page.imagelength)
            values = page.asarray(squeeze=False)  # (planes, depth, H, W, channels)
            extra, turned = (*page.extrasamples, None)[0], page.tags.valueof(ORIENTATION, default=1)
    except (LookupError, TypeError, ArithmeticError):  # what tifffile makes of damaged tags
        raise UnidentifiedImageError(path) from None
    if values.shape[1] > 1:
        raise ValueError(f"it is {SLICES}")
    colours = 3 if kind == PHOTOMETRIC.RGB else 1
    values = values[:, 0].transpose(1, 2, 0, 3).reshape(*values.shape[2:4], -1).astype(np.float64)
    shown, alpha = values[..., :colours], values[..., colours : colours + 1]
    if colours == 1 and alpha.size and extra not in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA):
        raise ValueError(f"it has {values.shape[2]} channels that are no colours; save the one you mean")
    whole = 1.0 if sort == SAMPLEFORMAT.IEEEFP else 2.0**bits - 1
    dark_is_high = kind == PHOTOMETRIC.MINISWHITE
    if alpha.size and extra in (None, EXTRASAMPLE.UNASSALPHA):
        shown = whole - (whole - shown) * (alpha / whole) if dark_is_high else shown * (alpha / whole)
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    name = "RGB" if colours == 3 else "F" if sort == SAMPLEFORMAT.IEEEFP else "I"
    info = {"exif": exif.tobytes(), "notes": [PAGES] * several}
    return Deep(shown if colours == 3 else shown[..., 0], f"{name};{bits}", info, None, dark_is_high)


def _deep_png(path: Path, image: Image.Image) -> Deep:
    """Sixteen bits in colour or with transparency, of which Pillow has the high byte alone."""
    from imagecodecs import png_decode

    values = png_decode(path.read_bytes()).astype(np.float64)
    if values.shape[2] != 3:
        values = values[..., :-1] * (values[..., -1:] / 65535)
    return Deep(values if values.shape[2] == 3 else values[..., 0], f"{image.mode};16", image.info)


def _dicom(path: Path, deep_only: bool, windowed: bool) -> Image.Image | Deep | None:
    """One DICOM image as a viewer shows it: modality and VOI tables or windows applied."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    file = dcmread(path, force=True)
    if "PixelData" not in file:
        raise ValueError("it holds no DICOM image; remove it")
    if int(file.get("NumberOfFrames") or 1) > 1:
        advice = "save the one you mean as a file of its own, for example with DCMTK (dcmj2pnm --frame N --write-png)"
        raise ValueError(f"it holds {file.NumberOfFrames} frames; {advice}")
    table = file.get("VOILUTSequence")
    window = all(file.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth"))
    gray = file.PhotometricInterpretation.startswith("MONOCHROME")
    if deep_only and (not gray or table or window):
        return None
    try:
        values = pixel_array(file)  # YBR becomes RGB
    except (RuntimeError, NotImplementedError):
        name = file.file_meta.TransferSyntaxUID.name
        raise ValueError(f"compressed as {name}, which cannot be read; pip install 'pylibjpeg[all]' may help") from None
    if file.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, file)
    if not gray:
        deep = Deep(values.astype(np.float64), "DICOM colour", {}, (0, 255 if values.itemsize == 1 else 65535))
        return Image.fromarray(values) if values.itemsize == 1 else deep
    stored = np.array([0, 2**file.BitsStored - 1]) - file.PixelRepresentation * 2 ** (file.BitsStored - 1)
    limits = tuple(sorted(apply_modality_lut(stored, file).tolist()))
    values, own = apply_modality_lut(values, file), limits == (0, 255)
    if windowed and table:
        entries, first, bits = table[0].LUTDescriptor
        # pydicom counts in as many bits as an entry has, so that a higher value would come round.
        table[0].LUTDescriptor, limits, own = [entries, first, 16], (0, 2**bits - 1), True
        values = apply_voi_lut(values.clip(None, first + (entries or 2**16) - 1).astype(np.int32), file)
    elif windowed and window:
        values, own = apply_voi_lut(values, file), True
    dark_is_high = file.PhotometricInterpretation == "MONOCHROME1"
    return Deep(values.astype(np.float64), "DICOM", {}, limits if own else None, dark_is_high)


def extremes(path: Path) -> tuple[float, float] | None:
    """The lowest and the highest value of a deep image; None for others and for what cannot be read."""
    with suppress(Exception):  # the error is told when the image is converted
        deep = read(path, deep_only=True)
        if deep and not deep.limits:
            values = deep.values[np.isfinite(deep.values)]
            return float(values.min()), float(values.max())
    return None


def eight_bits(path: Path, intensity: list | str | None, windowed: bool) -> tuple[Image.Image, list[str]]:
    """An image of eight bits and notes on how it was made.

    Args:
        path: its file.
        intensity: the values that become black and white, or "percentile" for those of each image.
        windowed: use the window of a DICOM file first.
    """
    image = read(path, windowed=windowed)
    notes = image.info.get("notes", [])
    if not isinstance(image, Deep):
        return image, notes
    finite = image.values[np.isfinite(image.values)]
    if not finite.size:
        raise ValueError("it holds no number but NaN and infinity; mend or remove it")
    each = intensity == "percentile"
    low, high = np.percentile(finite, PERCENTILES) if each else windowed and image.limits or intensity
    values = np.nan_to_num(image.values, nan=low)
    pixels = (255 * ((values - low) / (high - low or 1)).clip(0, 1)).round().astype(np.uint8)
    pixels = 255 - pixels if image.dark_is_high else pixels
    said = "their percentiles" if each else f"{low:g}..{high:g}"
    said = "their own window" if windowed and image.limits else said
    notes = [*notes, f"{image.kind} images scaled to 8 bits from {said}"]
    if len(left := np.unique(pixels)) < FEW and len(np.unique(finite)) > len(left):
        notes.append(LOST)
    scaled = Image.fromarray(pixels)
    scaled.info = image.info
    return scaled, notes
