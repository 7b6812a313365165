"""Three schematics in one style, drawn as SVG: MoCo, MoCo with a loss on its stages, and the way of the data."""

import base64
import html

from mocolayers.notebook.figures import ARM_COLOURS, STAGE_COLOURS

INK, QUERY, KEY, LOSS, PALE = "#222222", ARM_COLOURS["moco"], "#6A3D9A", ARM_COLOURS["mse"], "#f4f4f4"
STAGE_TEXT = (INK, INK, "#ffffff", "#ffffff")
STAGE_MIDDLES = (305, 369, 433, 497)  # of the four stages, from left to right
ARROWS = (
    "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
    "<path d='M0,0 L10,5 L0,10 z' fill='context-stroke'/></marker></defs>"
)


class Schematic:
    """A drawing that Jupyter shows, with a text for readers who cannot see it.

    Args:
        parts: pieces of SVG.
        size: width and height in pixels.
        alt: what the drawing says, in words.
    """

    def __init__(self, parts: list[str], size: tuple[int, int], alt: str) -> None:
        self.alt, (self.width, height) = alt, size
        self.svg = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {height}' role='img' "
            f"width='{self.width}' height='{height}' font-family='sans-serif' font-size='14'>"
            f"<title>{html.escape(alt)}</title>{ARROWS}<rect width='100%' height='100%' fill='#ffffff'/>"
            f"{''.join(parts)}</svg>"
        )

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        picture = base64.b64encode(self.svg.encode()).decode()
        image = f"<img alt='{html.escape(self.alt, quote=True)}' src='data:image/svg+xml;base64,{picture}'"
        return {"text/html": f"{image} width='{self.width}' style='max-width:100%'>", "text/plain": self.alt}


def _text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle", size: int = 14) -> str:
    """Lines of text around the height y."""
    rows = words.split("\n")
    first = y - 0.6 * size * (len(rows) - 1) + 0.35 * size
    return "".join(
        f"<text x='{x}' y='{first + 1.2 * size * number:.1f}' fill='{colour}' text-anchor='{anchor}' "
        f"font-size='{size}'>{html.escape(row)}</text>"
        for number, row in enumerate(rows)
    )


def _box(x: float, y: float, w: float, h: float, words: str, edge: str = INK, fill: str = PALE, ink: str = INK) -> str:
    """A box with its left upper corner at (x, y)."""
    shape = f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='6' fill='{fill}' stroke='{edge}' stroke-width='1.5'/>"
    return shape + (_text(x + w / 2, y + h / 2, words, ink) if words else "")


def _arrow(*points: tuple[float, float], colour: str = INK, dashed: bool = False) -> str:
    """A line through some points with a tip at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dashes = " stroke-dasharray='5 4'" if dashed else ""
    return (
        f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.8' marker-end='url(#tip)'{dashes}/>"
    )


def _encoder(y: float, colour: str) -> list[str]:
    """Four stages in a frame."""
    stages = zip(STAGE_MIDDLES, STAGE_COLOURS, STAGE_TEXT, strict=True)
    boxes = [_box(x - 27, y + 12, 54, 40, f"stage\n{n}", INK, fill, ink) for n, (x, fill, ink) in enumerate(stages, 1)]
    return [_box(240, y, 300, 64, "", colour, "#ffffff"), *boxes]


def moco(taps: bool = False) -> Schematic:
    """Two views, two encoders, momentum, queue and loss; with `taps`, a loss on each of the four stages as well."""
    parts = [*_encoder(40, QUERY), *_encoder(236, KEY)]
    parts += [
        _text(390, 24, "query encoder θ: learns by gradient", QUERY),
        _text(390, 318, "key encoder ξ: no gradient", KEY),
        _box(8, 140, 84, 60, "image x"),
        _box(116, 50, 92, 44, "view q"),
        _box(116, 246, 92, 44, "view k"),
        _arrow((50, 140), (50, 72), (116, 72)),
        _arrow((50, 200), (50, 268), (116, 268)),
        _arrow((208, 72), (240, 72)),
        _arrow((208, 268), (240, 268)),
        _arrow((256, 104), (256, 236), colour=KEY, dashed=True),
        _text(246, 170, "momentum\nξ ← m ξ + (1−m) θ", KEY, "end", 13),
        _box(576, 52, 60, 40, "q", QUERY),
        _box(576, 248, 60, 40, "k", KEY),
        _arrow((540, 72), (576, 72)),
        _arrow((540, 268), (576, 268)),
        _box(660, 130, 132, 64, "InfoNCE:\nwhich key is mine?", LOSS),
        _arrow((636, 72), (726, 72), (726, 130)),
        _arrow((606, 248), (606, 162), (660, 162)),
        *[_box(672 + 18 * place, 256, 18, 24, "", KEY) for place in range(6)],
        _arrow((636, 268), (672, 268), colour=KEY, dashed=True),
        _arrow((726, 256), (726, 194)),
        _text(726, 300, "queue: keys of\nother images", KEY),
    ]
    alt = (
        "Two random views of one image. The query encoder makes q of one, the key encoder k of the other. The loss "
        "InfoNCE asks q to pick k among the keys in a queue. The key encoder follows the query encoder by momentum."
    )
    if not taps:
        return Schematic(parts, (800, 334), alt)
    for number, (x, colour, ink) in enumerate(zip(STAGE_MIDDLES, STAGE_COLOURS, STAGE_TEXT, strict=True), start=1):
        parts += [_arrow((x, 92), (x, 150), colour=QUERY), _arrow((x, 248), (x, 190), colour=KEY)]
        parts.append(_box(x - 20, 150, 40, 40, f"L{number}", LOSS, colour, ink))
    parts.append(_text(390, 350, "loss = InfoNCE + λ₁ L₁ + λ₂ L₂ + λ₃ L₃ + λ₄ L₄", LOSS))
    alt += " A loss between the two views is added after each of the four stages, with a weight lambda each."
    return Schematic(parts, (800, 366), alt)


def data_way() -> Schematic:
    """From images without labels to a test score."""
    parts = [
        _box(8, 92, 132, 64, "training images\nno labels"),
        _box(176, 92, 120, 64, "pretrain\nMoCo + stages", QUERY),
        _box(332, 92, 104, 64, "encoder", QUERY),
        _box(472, 92, 132, 64, "train a classifier\non its features", LOSS),
        _box(640, 92, 152, 64, "test patients:\nAUC and its interval"),
        _box(332, 8, 104, 52, "1% of\nthe labels", LOSS),
        *[_arrow((x, 124), (x + 36, 124)) for x in (140, 296, 436, 604)],
        _arrow((436, 34), (538, 34), (538, 92), colour=LOSS),
        _arrow((74, 92), (74, 34), (332, 34), dashed=True),
        _text(203, 20, "whole patients, chosen with a seed", size=12),
        _text(400, 178, "validation patients choose the settings; no test patient is seen before the end", size=12),
    ]
    alt = (
        "All training images without labels pretrain an encoder. The labels of 1% of them train a classifier on its "
        "features. Patients who were in neither are the test and give an AUC with an interval."
    )
    return Schematic(parts, (800, 194), alt)
