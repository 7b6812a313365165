"""Draw three synthetic medical data sets whose findings have known causes: chest, histology and retina phantoms.

Nothing here was photographed. A phantom is for learning and for testing when no real image is at hand: every image can
be drawn with and without its finding, on the same anatomy, at any side and any difficulty.
"""

import argparse
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from common import run
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.interpolate import BSpline
from tqdm import tqdm

from mocolayers.data.folders import check_target
from mocolayers.data.prepared import data_folder, save_prepared
from mocolayers.runtime import DatasetError

EXAMPLES = """examples:
  python data_scripts/phantoms.py
  python data_scripts/phantoms.py --name retina_phantom --side 64 --difficulty 0.2
  python data_scripts/phantoms.py --name chest_phantom --images 400 --out easy --difficulty 0
"""
IMAGES = 4400
SIDE = 28  # as in MedMNIST, so that a rehearsal costs what the smallest real data sets cost
FINER = 2  # fields are drawn at this many times the side and averaged, outlines (`Ink`) four times finer still
ENDS = (15 / 22, 17 / 22)  # the shares of patients at which train and validation end; codes are 0, 1 and 2
# Random streams of one image: what the patient shares, what the exposure adds, what the finding adds. They are apart
# so that drawing the finding, or making it harder to see, leaves every other pixel as it was.
PATIENT, EXPOSURE, FINDING, PLAN = range(4)


def reduce(image: np.ndarray, side: int) -> np.ndarray:
    """Average (C, n*side, n*side) over squares of n*n pixels: (side, side, C)."""
    n = image.shape[1] // side
    return image.reshape(-1, side, n, side, n).mean(axis=(2, 4), dtype=np.float32).transpose(1, 2, 0)


@cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x (1, size) to the right and y (size, 1) downwards, in units of the image side."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return centres[None, :], centres[:, None]


@cache
def _spline_basis(cells: int, size: int) -> np.ndarray:
    knots = np.arange(-3, cells + 4) / cells
    return BSpline.design_matrix(grid(size)[0][0].astype(float), knots, 3).toarray().astype(np.float32)


def smooth_noise(rng: np.random.Generator, cells: int | tuple[int, int], size: int) -> np.ndarray:
    """(size, size) random field of mean 0 and standard deviation about 1, with `cells` knots down and across."""
    down, across = (cells, cells) if isinstance(cells, int) else cells
    knots = rng.standard_normal((down + 3, across + 3), dtype=np.float32)
    # Cubic B-spline weights have mean square 0.479 along each axis.
    return _spline_basis(down, size) @ knots @ _spline_basis(across, size).T / np.float32(0.479)


def soft_step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 well below zero, 1 well above it, a ramp of `width` in between."""
    return np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)


def turned(x, y, cx, cy, rx, ry, angle) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates about (cx, cy) along axes that are turned by `angle`, in units of rx and ry."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = x - np.float32(cx), y - np.float32(cy)
    return (c * x + s * y) / np.float32(rx), (c * y - s * x) / np.float32(ry)


def bump(x, y, cx, cy, rx, ry=None, angle=0.0) -> np.ndarray:
    """A Gaussian hill of height 1 at (cx, cy) with standard deviations rx, ry turned by `angle`."""
    u, v = turned(x, y, cx, cy, rx, ry or rx, angle)
    return np.exp(np.float32(-0.5) * (u * u + v * v))


class Ink:
    """Anti-aliased shapes in units of the image side, later shapes over earlier ones."""

    def __init__(self, size: int):
        self.scale = size * 4
        self.image = Image.new("L", (self.scale, self.scale))
        self.pen = ImageDraw.Draw(self.image)

    def polygons(self, outlines: np.ndarray, values: np.ndarray | float = 1.0) -> None:
        """Fill (n, k, 2) outlines with values 0 to 1, one each or one for all."""
        fills = (255 * (np.zeros(len(outlines)) + values) + 0.5).astype(np.uint8).tolist()
        points = (outlines * self.scale).reshape(len(outlines), 2 * outlines.shape[1])
        for corners, fill in zip(points.tolist(), fills, strict=True):
            self.pen.polygon(corners, fill=fill)

    def lines(self, lines: np.ndarray, widths: np.ndarray | float, value: float = 1.0, taper: float = 0.5) -> None:
        """Draw (n, k, 2) lines whose width falls from `widths` to `taper` times that."""
        along = np.diff(lines, axis=1)
        across = np.concatenate([along[:, :1], along], axis=1)[..., ::-1] * (-1, 1)
        half = (np.zeros(len(lines)) + widths)[:, None] * np.linspace(0.5, 0.5 * taper, lines.shape[1])
        edge = across * (half / np.sqrt((across**2).sum(axis=2) + 1e-12))[..., None]
        self.polygons(np.concatenate([lines + edge, (lines - edge)[:, ::-1]], axis=1), value)

    def array(self) -> np.ndarray:
        """(size, size) coverage, 0 to 1."""
        return np.asarray(self.image.reduce(4), np.float32) / np.float32(255)


TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
WAVES = np.array([2, 3, 5])


def blobs(rng: np.random.Generator, centres, radius, stretch=1.0, angle=0.0, roughness=0.1) -> np.ndarray:
    """(n, 20, 2) outlines of ellipses with radii r*stretch and r/stretch whose radius wobbles by `roughness`.

    Centres are (n, 2); radius, stretch and angle are one number each or (n,).
    """
    n = len(centres)
    radius, stretch, angle = (np.zeros((n, 1)) + np.reshape(value, (-1, 1)) for value in (radius, stretch, angle))
    height, phase = rng.standard_normal((n, 3)) / (1, 1.5, 2), rng.uniform(0, 2 * np.pi, (n, 3))
    waves = np.sin(TURN[None, :, None] * WAVES + phase[:, None])
    wobble = 1 + roughness * (waves @ height[..., None])[..., 0]
    u, v = radius * stretch * wobble * np.cos(TURN), radius / stretch * wobble * np.sin(TURN)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * u - s * v, s * u + c * v], axis=2) + np.asarray(centres)[:, None]


def swell(outlines: np.ndarray, factor: float) -> np.ndarray:
    """The same outlines, `factor` times as large round their own centres."""
    centres = outlines.mean(axis=1, keepdims=True)
    return centres + factor * (outlines - centres)


def rimmed(outlines: np.ndarray, factor: float) -> np.ndarray:
    """(2n, k, 2): each outline after its own swollen copy, so that shapes drawn in turn keep a rim between them."""
    return np.stack([swell(outlines, factor), outlines], axis=1).reshape(-1, *outlines.shape[1:])


def paths(rng: np.random.Generator, start, angle, bend, length, waviness, steps=14) -> np.ndarray:
    """(n, steps + 1, 2) wavy lines: n starts (n, 2), first headings, total turn and lengths (n,)."""
    turn = rng.normal(0, waviness, (len(start), steps)).cumsum(axis=1)
    heading = angle[:, None] + bend[:, None] * np.linspace(0, 1, steps) + turn
    move = np.stack([np.cos(heading), np.sin(heading)], axis=2) * (length / steps)[:, None, None]
    return np.concatenate([start[:, None], start[:, None] + move.cumsum(axis=1)], axis=1)


def branches(rng: np.random.Generator, parents: np.ndarray, each: int, reach: float, waviness: float) -> np.ndarray:
    """Side branches of (n, k, 2) parents: (n * each, 8, 2), left and right in turn."""
    n, points = parents.shape[:2]
    at = np.sort(rng.integers(2, points - 1, (n, each)), axis=1)
    start = parents[np.arange(n)[:, None], at]
    ahead = parents[np.arange(n)[:, None], at + 1] - start
    side = np.where(np.arange(each) % 2, 1, -1) * rng.uniform(0.5, 1.1, (n, each))
    angle = np.arctan2(ahead[..., 1], ahead[..., 0]) + side
    length = reach * rng.uniform(0.5, 1.3, n * each)
    return paths(rng, start.reshape(-1, 2), angle.ravel(), -0.6 * side.ravel(), length, waviness, steps=7)


def shift_pose(image, rng: np.random.Generator, turn: float, shift: float, zoom: float, enlarge=1.0) -> np.ndarray:
    """Move (C, size, size) a little, as when the same patient is positioned a second time; black comes in."""
    size, angle, scale = image.shape[1], rng.normal(0, turn), enlarge + rng.normal(0, zoom)
    c, s = np.cos(angle) / scale, np.sin(angle) / scale
    dx, dy = size / 2 * (1 - c + s) + size * rng.normal(0, shift), size / 2 * (1 - s - c) + size * rng.normal(0, shift)
    affine = (c, -s, dx, s, c, dy)
    moved = [
        Image.fromarray(layer).transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        for layer in np.ascontiguousarray(image, np.float32)
    ]
    return np.stack([np.asarray(layer) for layer in moved])


def ease(difficulty: float, low: float, high: float) -> float:
    """A factor that is `high` at difficulty 0, 1 at 0.5 and `low` at 1."""
    return float(np.interp(difficulty, (0, 0.5, 1), (high, 1, low)))


def chest_plan(rng: np.random.Generator) -> list[int]:
    """One to four films; a patient who is ill on one is more often ill on the next."""
    ill = rng.random() < 0.5
    return [int(rng.random() < (0.72 if ill else 0.13)) for _ in range(rng.integers(1, 5))]


def paint_chest(patient, exposure, finding, positive, _image, difficulty, side) -> np.ndarray:
    """A frontal film (side, side, 1): soft tissue, two lungs, heart, ribs, clavicles, vessels and film noise."""
    size = FINER * side
    film, lungs, body = _chest_anatomy(patient, size)
    film = film + _chest_distractors(exposure, lungs, size)
    if positive:
        film = film + _opacity(finding, lungs, difficulty, size)
    film = shift_pose((film * body)[None], exposure, turn=0.025, shift=0.012, zoom=0.02, enlarge=1.09)
    film = np.clip(reduce(film, side), 0, None) * exposure.uniform(0.95, 1.3)
    film = np.clip(film + exposure.normal(0, 0.03), 0, 1) ** exposure.uniform(0.75, 1.35)
    grain = exposure.standard_normal(film.shape, dtype=np.float32) * exposure.uniform(0.008, 0.028)
    return film + grain * np.sqrt(0.15 + film)


@lru_cache(maxsize=1)
def _chest_anatomy(patient: tuple[int, ...], size: int) -> tuple[np.ndarray, dict, np.ndarray]:
    """The film without exposure, the lungs ("mask" and where their middle, apex, base and width are) and the body."""
    rng = np.random.default_rng(patient)
    x, y = grid(size)
    middle, width = rng.normal(0.5, 0.012), rng.uniform(0.3, 0.38)
    apex, base = rng.uniform(0.1, 0.17), rng.uniform(0.64, 0.8)
    u = x - np.float32(middle)
    out = np.abs(u)
    down = np.clip((y - apex) / (base - apex), 0, 1.2)
    lung, dome = _lung_fields(rng, u, out, y, down, width, base)
    shadow = _heart_and_arch(rng, u, y, apex, base)
    air = lung * (1 - 0.93 * shadow)
    shoulder = 0.02 + 1.9 * np.clip(out - rng.uniform(0.1, 0.14), 0, None) ** 1.7
    flank = rng.uniform(0.4, 0.5) + rng.uniform(0.05, 0.4) * np.clip(0.42 - y, 0, 1)
    body = soft_step(flank - out, 0.03) * soft_step(y - shoulder, 0.03)

    tissue = 0.6 + 0.18 * soft_step(y - dome, 0.1) - 0.25 * np.clip(out - 0.25, 0, 1) + 0.1 * shadow
    spine, windpipe = np.exp(-((u / 0.09) ** 2)), np.exp(-((u / 0.018) ** 2)) * soft_step(apex + 0.17 - y, 0.1)
    lucent = rng.uniform(0.38, 0.5) * (1 - 0.25 * np.clip(down - 0.5, 0, 1))
    film = tissue + 0.12 * spine - 0.1 * windpipe - lucent * air + 0.02 * smooth_noise(rng, 6, size)
    film = film + _ribs(rng, u, out, y, apex, width) * (0.35 + 0.65 * air)
    film = film + _clavicles(rng, u, out, y, apex)
    film = film + rng.uniform(0.1, 0.16) * air * _lung_vessels(rng, middle, apex, base, size)
    for sign in (-1, 1):
        film = film + 0.12 * air * bump(u, y, sign * 0.09, (apex + base) / 2, 0.04, 0.07, sign * 0.3)
    if rng.random() < 0.45:
        film = film + _breasts(rng, u, y, base)
    lungs = {"mask": air, "middle": middle, "width": width, "apex": apex, "base": base}
    return film.astype(np.float32), lungs, body


def _lung_fields(rng, u, out, y, down, width, base) -> tuple[np.ndarray, np.ndarray]:
    """The two lungs (0 to 1), and the height of the diaphragm below each column."""
    lateral = width * np.sqrt(np.clip(1 - np.clip(1 - down, 0, 1) ** 2.6, 0, 1)) * (0.86 + 0.14 * down)
    medial = rng.uniform(0.035, 0.055) + 0.035 * down
    curve = rng.uniform(0.12, 0.4)
    dome = base + np.where(u > 0, rng.uniform(0.0, 0.05), 0) + curve * (out / width - 0.45) ** 2
    return soft_step(lateral - out, 0.025) * soft_step(out - medial, 0.03) * soft_step(dome - y, 0.025), dome


def _heart_and_arch(rng, u, y, apex, base) -> np.ndarray:
    """The heart, bulging to the patient's left, and the aortic arch above it."""
    large, knob = rng.uniform(0.85, 1.2), rng.uniform(0.75, 1.15)
    heart = _ellipse(u, y, 0.055 * large, base - 0.09, 0.175 * large, 0.12 * large, rng.uniform(0.4, 0.7), 0.25)
    waist = _ellipse(u, y, 0.025, (apex + base) / 2 + 0.02, 0.075, 0.19, 0, 0.35)
    arch = _ellipse(u, y, 0.04, apex + 0.2, 0.042 * knob, 0.05 * knob, 0, 0.4)
    return 1 - (1 - heart) * (1 - 0.9 * waist) * (1 - 0.8 * arch)


def _ellipse(x, y, cx, cy, rx, ry, angle, softness) -> np.ndarray:
    u, v = turned(x, y, cx, cy, rx, ry, angle)
    return soft_step(1 - np.sqrt(u * u + v * v), softness)


def _ribs(rng, u, out, y, apex, width) -> np.ndarray:
    spacing, tilt = rng.uniform(0.068, 0.082), rng.uniform(0.7, 1.3)
    posterior = (y - apex - 0.16 * tilt * (out / width) ** 2 + 0.06 * out / width) / spacing
    anterior = (y - apex - 0.16 * tilt * (1 - out / width)) / (1.12 * spacing)
    inside = soft_step(width * 1.1 - out, 0.03) * soft_step(y - apex, 0.05)
    bright, faint = rng.uniform(0.07, 0.12), rng.uniform(0.02, 0.05)
    back = np.clip(0.5 + 1.4 * np.cos(2 * np.pi * (posterior + rng.random())), 0, 1)
    front = np.clip(0.4 + 1.2 * np.cos(2 * np.pi * (anterior + rng.random())), 0, 1) * soft_step(out - 0.12, 0.1)
    return (bright * (back - 0.5) + faint * (front - 0.4)) * inside


def _clavicles(rng, u, out, y, apex) -> np.ndarray:
    lift, low = rng.uniform(0.1, 0.35), apex + rng.uniform(0.03, 0.08) + rng.normal(0, 0.01) * np.sign(u)
    line = low - lift * (out - 0.05) + 0.012 * np.sin(18 * out)
    ends = soft_step(out - 0.045, 0.02) * soft_step(0.36 - out, 0.05)
    return 0.13 * soft_step(0.015 - np.abs(y - line), 0.012) * ends


def _lung_vessels(rng, middle, apex, base, size) -> np.ndarray:
    ink, each = Ink(size), 6
    root = np.repeat([[middle - 0.08, (apex + base) / 2], [middle + 0.08, (apex + base) / 2]], each, axis=0)
    fan = np.tile(np.linspace(-1.2, 1.25, each), 2) + rng.normal(0, 0.15, 2 * each)
    angle = np.where(np.arange(2 * each) < each, np.pi - fan, fan)
    trunks = paths(rng, root, angle, rng.normal(0, 0.3, 2 * each), rng.uniform(0.15, 0.3, 2 * each), 0.08)
    twigs = branches(rng, trunks, 3, 0.1, 0.1)
    ink.lines(trunks, rng.uniform(0.008, 0.018, len(trunks)))
    ink.lines(twigs, rng.uniform(0.004, 0.008, len(twigs)))
    return ndimage.gaussian_filter(ink.array(), 0.004 * size)


def _breasts(rng, u, y, base) -> np.ndarray:
    radius, low, strength = rng.uniform(0.13, 0.19), base + rng.uniform(-0.1, 0.02), rng.uniform(0.05, 0.11)
    fold = soft_step(y - low + 0.16, 0.2)
    sides = [sign * rng.uniform(0.19, 0.22) for sign in (-1, 1)]
    return strength * fold * sum(_ellipse(u, y, side, low - 0.06, radius, radius * 0.9, 0, 0.45) for side in sides)


def _place_in_lung(rng, lungs) -> tuple[float, float]:
    """A point well inside one of the two lungs, left and right equally often."""
    down = rng.uniform(0.22, 0.88)
    out = lungs["width"] * rng.uniform(0.42, 0.8) * min(1, 0.55 + down)
    return lungs["middle"] + rng.choice((-1, 1)) * out, lungs["apex"] + down * (lungs["base"] - lungs["apex"])


def _opacity(rng, lungs, difficulty, size) -> np.ndarray:
    """The finding: a soft, irregular patch of consolidation that never leaves the lung."""
    x, y = grid(size)
    cx, cy = _place_in_lung(rng, lungs)
    radius = rng.uniform(0.055, 0.085) * ease(difficulty, 0.75, 1.35)
    strength = rng.uniform(0.15, 0.26) * ease(difficulty, 0.45, 1.6)
    wall = 1 + 0.35 * smooth_noise(rng, 9, size)
    hill = bump(x, y, cx, cy, radius * rng.uniform(0.8, 1.3), radius, rng.uniform(0, np.pi))
    fluff = np.clip(1 + 0.35 * smooth_noise(rng, 14, size), 0.2, 2)
    return strength * lungs["mask"] * fluff * np.clip(hill * wall, 0, 1)


def _chest_distractors(rng, lungs, size) -> np.ndarray:
    """What brightens a film in the ill and the healthy alike: markers, a letter, a line, a haze over one side."""
    x, y = grid(size)
    ink = Ink(size)
    if rng.random() < 0.7:
        left, top, tall = rng.uniform(0.84, 0.92), rng.uniform(0.06, 0.2), rng.uniform(0.04, 0.06)
        letter = np.array([[0, 0], [0.3, 0], [0.3, 0.75], [0.7, 0.75], [0.7, 1], [0, 1]])
        ink.polygons(letter[None] * tall + (left, top), 0.9)
    places = [_place_in_lung(rng, lungs) for _ in range(rng.integers(0, 3))]
    for place in places:
        ink.polygons(blobs(rng, [place], rng.uniform(0.014, 0.03), roughness=0), rng.uniform(0.25, 0.7))
    if rng.random() < 0.3:
        start = np.array([[rng.uniform(0.2, 0.8), 0.05]])
        tube = paths(rng, start, np.array([np.pi / 2]), rng.normal(0, 1, 1), rng.uniform(0.3, 0.7, 1), 0.12)
        ink.lines(tube, 0.008, rng.uniform(0.3, 0.6), taper=1)
    tilt_x, tilt_y, aeration = rng.normal(0, (0.1, 0.1, 0.05)).tolist()
    haze = tilt_x * (x - 0.5) + tilt_y * (y - 0.5) + aeration * lungs["mask"]
    return 0.45 * ink.array() + haze


def histology_plan(rng: np.random.Generator) -> list[int]:
    """Two to ten patches of one slide; slides differ in how much of them is tumour."""
    share = rng.beta(0.9, 1.2)
    return [int(rng.random() < share) for _ in range(rng.integers(2, 11))]


def paint_histology(patient, exposure, finding, positive, _image, difficulty, side) -> np.ndarray:
    """A patch (side, side, 3) of stained tissue: light that passes eosin and haematoxylin (Beer-Lambert)."""
    size = FINER * side
    stain = _stain(np.random.default_rng(patient))
    eosin, holes, flow = _stroma(exposure, stain, size)
    ordinary = _ordinary_nuclei(exposure, flow, stain, size)
    amount = exposure.uniform(0.16, 0.42) * stain["strength"]
    crowd, cover = _crowd(finding, positive, stain, difficulty, size)
    holes = holes * (1 - cover)
    nuclei = (ordinary * (1 - cover) + crowd) * (1 - holes)
    chromatin = np.clip(1 + 0.28 * smooth_noise(exposure, 40, size), 0.4, 1.7)
    blue = nuclei * chromatin
    # The same total of haematoxylin with and without tumour: what nuclei do not take tints the stroma.
    tissue = 1 - holes
    haze = float(np.clip(amount - blue.mean(), 0.02, 0.22))
    blue = stain["depth"] * (blue + haze * tissue * np.clip(1 + 0.3 * smooth_noise(exposure, 5, size), 0, 2))
    pink = eosin * tissue * (1 - 0.45 * nuclei)
    density = np.stack([h * blue + e * pink for h, e in zip(stain["haematoxylin"], stain["eosin"], strict=True)])
    light = exposure.uniform(0.93, 1.0) * np.exp(-density)
    return reduce(light, side) + 0.012 * exposure.standard_normal((side, side, 3), np.float32)


def _stain(rng: np.random.Generator) -> dict:
    """Colours (optical density in red, green, blue) and strengths of the two dyes on one patient's slide."""
    return {
        "haematoxylin": (np.array([0.95, 1.2, 0.55]) * rng.normal(1, 0.1, 3)).tolist(),
        "eosin": (np.array([0.12, 0.62, 0.3]) * rng.normal(1, (0.35, 0.12, 0.2))).clip(0.03).tolist(),
        "depth": rng.uniform(0.8, 1.25),
        "strength": rng.uniform(0.8, 1.2),
        "fat": rng.random() < 0.4,
        "radius": rng.uniform(0.023, 0.03),
    }


def _stroma(rng, stain, size) -> tuple[np.ndarray, np.ndarray, float]:
    """Eosin per pixel with its fibres, the holes (0 to 1), and the direction in which fibres run."""
    x, y = grid(size)
    flow = rng.uniform(0, np.pi)
    across = x * np.float32(-np.sin(flow)) + y * np.float32(np.cos(flow))
    warp = 0.06 * smooth_noise(rng, 4, size)
    fibre = np.sin(2 * np.pi * (rng.uniform(7, 12) * (across + warp)) + 1.2 * smooth_noise(rng, 8, size))
    # Fibres are plain in some places and lost in others.
    fibre = 0.13 * fibre * np.clip(0.8 + 0.7 * smooth_noise(rng, 4, size), 0, 2)
    grain = 0.12 * smooth_noise(rng, 5, size) + 0.08 * smooth_noise(rng, (30, 20), size)
    eosin = rng.uniform(0.55, 0.85) + fibre + grain
    ink, rim = Ink(size), Ink(size)
    if stain["fat"] and rng.random() < 0.6:
        n = rng.integers(2, 9)
        spots = rng.uniform(0, 1, 2) + rng.normal(0, 0.2, (n, 2))
        cells = blobs(rng, spots, rng.uniform(0.06, 0.13, n), rng.uniform(1, 1.2, n), rng.uniform(0, 3, n), 0.06)
        rim.polygons(swell(cells, 1.12))
        ink.polygons(rimmed(cells, 1.12), np.tile([0, 1], n))
    n = rng.integers(0, 4)
    ink.polygons(blobs(rng, rng.uniform(0, 1, (n, 2)), rng.uniform(0.015, 0.05, n), rng.uniform(1, 2.2, n), flow, 0.25))
    holes = ink.array()
    return np.clip(eosin + 0.25 * rim.array() * (1 - holes), 0.1, 1.6), holes, flow


def _ordinary_nuclei(rng, flow, stain, size) -> np.ndarray:
    """(size, size) haematoxylin of what every slide holds: fibroblasts, a gland now and then, clumps of lymphocytes."""
    ink, r, n = Ink(size), stain["radius"], rng.integers(10, 34)
    long, lean = rng.uniform(1.25, 1.9, n), flow + rng.normal(0, 0.25, n)
    spindles = blobs(rng, rng.uniform(0, 1, (n, 2)), r * rng.uniform(0.75, 1.05, n), long, lean, 0.06)
    ink.polygons(spindles, rng.uniform(0.45, 0.75, n))
    if rng.random() < 0.5:
        centre, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.09, 0.18)  # a ring of evenly spaced, regular nuclei
        ring = blobs(rng, [centre], radius, rng.uniform(1, 1.4), rng.uniform(0, np.pi), 0.05)[0]
        ring = ring[:: 1 if radius > 0.13 else 2]
        outward = np.arctan2(*(ring - centre).T[::-1])
        cells = blobs(rng, ring, r * rng.uniform(0.9, 1.1, len(ring)), 1.25, outward, 0.04)
        ink.polygons(cells, rng.uniform(0.6, 0.8, len(ring)))
    n, middle, spread = rng.integers(0, 30), rng.uniform(0.1, 0.9, 2), rng.uniform(0.07, 0.16)
    clump = blobs(rng, rng.normal(middle, spread, (n, 2)), r * rng.uniform(0.65, 0.8, n), 1.05, roughness=0.04)
    ink.polygons(clump, rng.uniform(0.7, 1, n))
    return ink.array()


def _crowd(rng, positive, stain, difficulty, size) -> tuple[np.ndarray, np.ndarray]:
    """The finding, or what stands in its place: crowded nuclei, and the part of the patch that they cover.

    Tumour nuclei are large, irregular and unequally dark. Without tumour the same ground is mostly taken by as great
    an area of small round lymphocytes, so that neither the mean colour nor its spread tells the two apart.
    """
    ink, over = Ink(size), Ink(size)
    middle, spread, area = rng.uniform(0.2, 0.8, 2), rng.uniform(0.11, 0.2), rng.uniform(0.05, 0.19)
    if positive:
        r, rough, stretch, large = rng.uniform(0.034, 0.048), 0.15, 1.4, ease(difficulty, 0.75, 1.25)
    elif rng.random() < 0.65:
        r, rough, stretch, large = rng.uniform(0.85, 1.25) * stain["radius"], 0.05, 1.1, 1.0
    else:
        return ink.array(), over.array()
    n = round(area / (np.pi * r * r))
    radius, angle = large * r * rng.uniform(1 - 2 * rough, 1 + 2 * rough, n), rng.uniform(0, np.pi, n)
    cells = blobs(rng, rng.normal(middle, spread, (n, 2)), radius, rng.uniform(1, stretch, n), angle, rough)
    dark = np.clip(rng.normal(0.76, 1.3 * rough, n), 0.3, 1)
    over.polygons(swell(cells, 1.25))
    ink.polygons(rimmed(cells, 1.15), np.stack([np.full(n, 0.12), dark], axis=1).ravel())
    return ink.array(), over.array()


REFERABLE = 2


def retina_plan(rng: np.random.Generator) -> list[int]:
    """The grades 0-4 of a patient's right and left eye, alike or one apart."""
    first = rng.choice(5, p=(0.36, 0.2, 0.22, 0.13, 0.09))
    return [int(first), int(np.clip(first + rng.choice((-1, 0, 1), p=(0.15, 0.7, 0.15)), 0, 4))]


def paint_retina(patient, exposure, finding, grade, image, difficulty, side) -> np.ndarray:
    """A fundus photograph (side, side, 3): disc, macula, arcades, camera; image 0 is a right eye, 1 a left one."""
    size, patient = FINER * side, np.random.default_rng(patient)
    eye, disc, macula = _fundus(patient, exposure, size)
    eye = _harmless_spots(exposure, eye, disc, size)
    if grade:
        eye = _retinopathy(finding, eye, grade, disc, macula, difficulty, size)
    if image % 2:
        eye = eye[:, :, ::-1]
    eye = shift_pose(eye, exposure, turn=0.06, shift=0.015, zoom=0.02, enlarge=1.05)
    return _camera(patient, exposure, eye, side)


def _fundus(patient, exposure, size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A right eye without lesions (3, size, size), and where disc and macula lie; vessels differ between the eyes."""
    x, y = grid(size)
    disc = np.array([0.74, 0.5]) + patient.normal(0, (0.02, 0.025))
    macula = disc + (-0.29, 0.02) + patient.normal(0, 0.012, 2)
    pigment = np.array([0.82, 0.4, 0.17]) * patient.normal(1, (0.06, 0.13, 0.25)).clip(0.6, 1.4)
    tigroid = patient.uniform(0.02, 0.08)
    mottle = 1 + 0.04 * smooth_noise(exposure, 5, size) + tigroid * 0.5 * smooth_noise(exposure, (26, 16), size)
    eye = _rgb(pigment) * mottle
    dark = patient.uniform(0.25, 0.5) * bump(x, y, *macula, patient.uniform(0.05, 0.08))
    eye = eye * (1 - dark * _rgb((0.6, 0.9, 0.8)))
    radius = patient.uniform(0.052, 0.066)
    halo = 0.25 * bump(x, y, *disc, 1.8 * radius)
    rim = _ellipse(x, y, *disc, radius, radius * 1.12, 0, 0.35)
    cup = _ellipse(x, y, *(disc + (-0.005, 0)), radius * 0.5, radius * 0.55, 0, 0.6)
    glow = patient.uniform(0.75, 0.95)
    eye = _blend(eye, halo, (0.95, 0.65, 0.35))
    eye = _blend(eye, glow * rim, (1.0, 0.8, 0.48))
    eye = _blend(eye, 0.6 * cup, (1.0, 0.95, 0.78))
    vessels = _vessel_tree(exposure, disc, size)
    strength = patient.uniform(0.75, 1.1)
    eye = eye * (1 - strength * vessels * _rgb((0.3, 0.58, 0.5)))
    return eye, disc, macula


def _vessel_tree(rng, disc, size) -> np.ndarray:
    """Upper and lower arcades round the macula, shorter nasal trunks, and two orders of branches."""
    ink = Ink(size)
    # Headings of artery and vein in each quadrant; y runs downwards and the macula lies to the left of the disc.
    heading = np.array([-1.85, -1.65, 1.85, 1.65, -0.75, -0.55, 0.75, 0.55]) + rng.normal(0, 0.1, 8)
    bend = np.array([-1.75, -1.5, 1.75, 1.5, 0.3, 0.2, -0.3, -0.2]) + rng.normal(0, 0.2, 8)
    length = np.array([0.75, 0.7, 0.75, 0.7, 0.35, 0.3, 0.35, 0.3]) * rng.uniform(0.9, 1.1, 8)
    trunks = paths(rng, np.tile(disc, (8, 1)), heading, bend, length, 0.07)
    twigs = branches(rng, trunks, 4, 0.19, 0.1)
    ink.lines(branches(rng, twigs[::2], 1, 0.09, 0.12), 0.0035)
    ink.lines(twigs, rng.uniform(0.005, 0.008, 32))
    ink.lines(trunks, np.tile([0.011, 0.016], 4) * rng.uniform(0.9, 1.2))
    return ink.array()


def _rgb(colour) -> np.ndarray:
    return np.array(colour, np.float32)[:, None, None]


def _blend(image, cover, colour) -> np.ndarray:
    return image + cover * (_rgb(colour) - image)


def _places(rng, count, disc) -> np.ndarray:
    """(n, 2) points on the retina and not on the optic disc; n is at most `count`."""
    angle, radius = rng.uniform(0, 2 * np.pi, count), 0.41 * np.sqrt(rng.uniform(0.01, 1, count))
    spots = 0.5 + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return spots[np.hypot(*(spots - disc).T) > 0.1]


def _harmless_spots(rng, eye, disc, size) -> np.ndarray:
    """What mimics lesions in every grade: drusen, a sheen along the arcades, pigment, specks on the lens."""
    x, y = grid(size)
    spots = _places(rng, rng.poisson(7) * rng.integers(0, 2), disc)
    drusen, specks = Ink(size), Ink(size)
    drusen.polygons(blobs(rng, spots, rng.uniform(0.006, 0.016, len(spots))))
    eye = _blend(eye, 0.4 * ndimage.gaussian_filter(drusen.array(), 0.005 * size), (0.95, 0.75, 0.4))
    spots = _places(rng, rng.poisson(1.2), disc)
    specks.polygons(blobs(rng, spots, rng.uniform(0.01, 0.022, len(spots))), rng.uniform(0.3, 0.7, len(spots)))
    eye = eye * (1 - 0.5 * ndimage.gaussian_filter(specks.array(), 0.008 * size))
    for _ in range(rng.integers(0, 3)):
        cx, cy = disc + rng.normal((-0.2, 0), (0.1, 0.12))
        sheen = bump(x, y, cx, cy, rng.uniform(0.03, 0.09), rng.uniform(0.008, 0.02), rng.uniform(0, np.pi))
        eye = _blend(eye, rng.uniform(0.1, 0.35) * sheen, (0.95, 0.85, 0.65))
    return eye


# Mean number of lesions by grade 0-4.
MICROANEURYSMS = (0, 4, 10, 18, 22)
HAEMORRHAGES = (0, 0, 5, 11, 14)
EXUDATE_CLUSTERS = (0, 0, 1.3, 2.2, 2.6)
COTTON_WOOL = (0, 0, 0.3, 1.5, 2.5)


def _retinopathy(rng, eye, grade, disc, macula, difficulty, size) -> np.ndarray:
    """The finding: red dots and blots, yellow exudates and pale cotton-wool spots, more of them with every grade."""
    large, strong = ease(difficulty, 0.75, 1.3), ease(difficulty, 0.5, 1.25)
    red, yellow, wool = Ink(size), Ink(size), Ink(size)
    dots = _places(rng, rng.poisson(MICROANEURYSMS[grade]) + 2, disc)
    red.polygons(blobs(rng, dots, rng.uniform(0.004, 0.007, len(dots)) * large), 0.85)
    blots = _places(rng, rng.poisson(HAEMORRHAGES[grade]) + 2 * (grade > 1), disc)
    n = len(blots)
    blots = blobs(rng, blots, rng.uniform(0.009, 0.022, n) * large, rng.uniform(1, 1.5, n), rng.uniform(0, 3, n), 0.2)
    red.polygons(blots, rng.uniform(0.6, 1, n))
    for _ in range(rng.poisson(EXUDATE_CLUSTERS[grade])):
        n, middle = rng.integers(5, 18), macula + rng.normal(0, 0.12, 2)
        cluster = blobs(rng, rng.normal(middle, 0.028, (n, 2)), rng.uniform(0.004, 0.009, n) * large, roughness=0.15)
        yellow.polygons(cluster, rng.uniform(0.7, 1, n))
    wools = _places(rng, rng.poisson(COTTON_WOOL[grade]), disc)
    wool.polygons(blobs(rng, wools, rng.uniform(0.016, 0.028, len(wools)) * large, 1.2, roughness=0.15), 0.8)
    eye = _blend(eye, 0.6 * strong * ndimage.gaussian_filter(wool.array(), 0.008 * size), (0.95, 0.85, 0.65))
    eye = _blend(eye, min(0.8 * strong, 1) * yellow.array(), (1.0, 0.88, 0.42))
    return eye * (1 - min(0.8 * strong, 1) * red.array() * _rgb((0.45, 0.75, 0.65)))


def _camera(patient, exposure, eye, side) -> np.ndarray:
    """Uneven light, colour balance and gain of one camera, its round field of view, and sensor noise."""
    x, y = grid(eye.shape[1])
    lean = exposure.normal(0, 0.12, 2).tolist()
    far = (x - 0.5 + lean[0]) ** 2 + (y - 0.5 + lean[1]) ** 2
    light = 1 - exposure.uniform(0.6, 1.6) * far + 0.05 * smooth_noise(exposure, 3, eye.shape[1])
    balance = patient.normal(1, (0.05, 0.06, 0.1)) * exposure.uniform(0.75, 1.15)
    field = soft_step(float(patient.choice((0.475, 0.475, 0.54))) - np.sqrt((x - 0.5) ** 2 + (y - 0.5) ** 2), 0.008)
    picture = reduce(eye * (light * field) * _rgb(balance), side)
    noise = exposure.uniform(0.004, 0.014) * exposure.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 1) ** exposure.uniform(0.85, 1.15) + noise * (0.2 + picture)


# What is drawn: the names of its classes; what gives the findings of a patient's images from a random stream, 0 or 1 or
# a grade 0-4; and what paints (side, side, C) floats, 0 black to 1 white.
PHANTOMS = {
    "chest_phantom": (["no opacity", "opacity"], chest_plan, paint_chest),
    "histology_phantom": (["no tumour", "tumour"], histology_plan, paint_histology),
    "retina_phantom": (["not referable", "referable"], retina_plan, paint_retina),
}


def draw(
    name: str, seed: int, patient: int, image: int, finding: int, side: int = SIDE, difficulty: float = 0.5
) -> np.ndarray:
    """Draw one (side, side, C) uint8; only the finding differs between calls that differ in finding or difficulty.

    In the histology phantom the tumour changes two more things on purpose: it takes the place of the lymphocytes, and
    the stain of the stroma makes up for the stain of its nuclei.

    Args:
        name: one of `PHANTOMS`.
        seed, patient, image: which anatomy and which exposure of it.
        finding: 0 or 1; for the retina a grade 0-4.
        side: pixels.
        difficulty: 0 (plain to see) to 1 (hardly visible).
    """
    key, paint = _key(name, seed, patient), PHANTOMS[name][2]
    exposure, lesion = (np.random.default_rng((*key, part, image)) for part in (EXPOSURE, FINDING))
    picture = paint((*key, PATIENT), exposure, lesion, finding, image, difficulty, side)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _key(name: str, seed: int, patient: int) -> tuple[int, ...]:
    return seed, list(PHANTOMS).index(name), patient


def make(
    name: str, images: int = IMAGES, seed: int = 0, side: int = SIDE, difficulty: float = 0.5
) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the card of a whole data set, split by patient, as `save_prepared` takes them; see `draw`."""
    plan, modality = _plan(name, images, seed), name.removesuffix("_phantom")
    patients, _, findings = np.array(plan).T
    arrays = {
        "images": np.stack([draw(name, seed, *row, side, difficulty) for row in tqdm(plan, desc=name, unit="image")]),
        "labels": (findings >= (REFERABLE if modality == "retina" else 1)).astype(np.int64),
        "patients": np.array([f"{modality}{patient:05d}" for patient in patients]),
        # Patients are independent draws, so any block of consecutive ones is a random sample.
        "split": np.digitize((patients + 0.5) / (patients.max() + 1), ENDS),
    }
    if modality == "retina":
        arrays["grades"] = findings
    options = f"--name {name} --images {images} --side {side} --seed {seed} --difficulty {difficulty:g}"
    card = {"title": f"{modality.capitalize()} phantom (synthetic)", "synthetic": True, "modality": modality}
    card |= {"task": "binary", "classes": PHANTOMS[name][0], "licence": "MIT", "citation": ""}
    return arrays, card | {"source": f"data_scripts/phantoms.py {options}"}


def _plan(name: str, images: int, seed: int) -> list[tuple[int, int, int]]:
    """(patient, image, finding) of every image: patients are added until there are enough images."""
    rows, patient = [], 0
    while len(rows) < images:
        findings = PHANTOMS[name][1](np.random.default_rng((*_key(name, seed, patient), PLAN)))
        rows += [(patient, image, finding) for image, finding in enumerate(findings)]
        patient += 1
    return rows[:images]


def main(options: argparse.Namespace) -> None:
    if not 0 <= options.difficulty <= 1:
        raise DatasetError(f"--difficulty {options.difficulty}: give a number from 0 to 1, for example 0.5")
    if options.side < 8 or options.images < 60 or options.seed < 0:
        raise DatasetError("--side must be at least 8, --images at least 60 and --seed at least 0")
    names = list(PHANTOMS) if options.name == "all" else [options.name]
    for name in names:
        check_target(options.out / name)
    for name in names:
        arrays, card = make(name, options.images, options.seed, options.side, options.difficulty)
        print(f"{card['title']}: {save_prepared(options.out / name, arrays, card)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", choices=[*PHANTOMS, "all"], default="all", help="which data set (%(default)s)")
    parser.add_argument("--out", type=Path, default=data_folder(), help="folder of prepared data sets (%(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels (%(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help="train + validation + test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another data set (%(default)s)")
    parser.add_argument("--difficulty", type=float, default=0.5, help="0 plain to see, 1 hardly visible (%(default)s)")
    run(main, parser)
