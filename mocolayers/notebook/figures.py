"""Every figure of the notebooks and the README: tables and arrays in, a matplotlib Figure out.

An arm has one colour and one marker everywhere. The colours are Okabe and Ito's, for colour-blind readers; two of them
are alike to some, the markers are not. Importing this module sets the look of all figures of a notebook.
"""

import io
from collections.abc import Iterable, Sequence
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
from IPython.display import Image, display
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

ARM_COLOURS = {
    "random": "#999999",
    "supervised": "#000000",
    "moco": "#0072B2",
    "mse": "#D55E00",
    "barlow": "#009E73",
    "mse-normalized": "#E69F00",
    "barlow-conditioned": "#56B4E9",
    "mse-standardized": "#CC79A7",
}
ARM_MARKERS = dict(zip(ARM_COLOURS, "XPos^Dv*", strict=True))
OTHER_COLOURS = ("#7B4A12", "#6A3D9A", "#8A9A00", "#AA0044")  # of what is no arm of the package
OTHER_MARKERS = "<>hpd"  # one more than colours: a colour that returns has another marker
STAGE_COLOURS = ("#fcbba1", "#fb6a4a", "#cb181d", "#67000d")

matplotlib.rc("axes", titlesize=12, titleweight="bold", titlelocation="left", grid=True, axisbelow=True)
matplotlib.rc("axes", prop_cycle=matplotlib.cycler(color=list(ARM_COLOURS.values())[2:]))
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc(("figure", "savefig"), dpi=90)
matplotlib.rc("font", size=11)
matplotlib.rc("grid", color="#e6e6e6")
matplotlib.rc("legend", frameon=False)


def show(figure: Figure, alt: str = "", photos: bool = False) -> None:
    """Display a figure in a notebook, see `picture`."""
    display(picture(figure, alt, photos))


def picture(figure: Figure, alt: str = "", photos: bool = False) -> Image:
    """A figure with a text for readers who cannot see it, as a notebook displays it; sheets of photos as JPEG."""
    form = "jpeg" if photos else "png"
    return Image(rendered(figure, form), format=form, alt=alt or described(figure))


def described(figure: Figure) -> str:
    """A figure in words: its title, and of each panel the title, the axes and the names of what it shows."""
    parts = [figure.get_suptitle()]
    for axis in figure.axes:
        rows = [tick.get_text() for tick in axis.get_yticklabels()]
        names = axis.get_legend_handles_labels()[1] + [row for row in rows if any(map(str.isalpha, row))]
        said = [axis.get_title("left"), axis.get_ylabel(), axis.get_xlabel(), ", ".join(dict.fromkeys(names))]
        parts.append("; ".join(filter(None, said)))
    return " ".join(part if part[-1] in ".?!" else f"{part}." for part in filter(None, parts))


def rendered(figure: Figure, form: str = "png", quick: bool = False) -> bytes:
    """A figure as the bytes of a picture file; a PNG of 256 colours, or if `quick` of all, and less compressed."""
    picture, small = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format=form, pil_kwargs={"compress_level": 1} if quick else None)
    if quick or form != "png":
        return picture.getvalue()
    PIL.Image.open(picture).convert("RGB").quantize(dither=PIL.Image.Dither.NONE).save(small, form, optimize=True)
    return small.getvalue()


def new_figure(rows=1, columns=1, size=(8, 4), layout="constrained", **options) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes; pyplot does not know it, so it is shown once, and threads may make it."""
    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def looks(names: Iterable[str]) -> dict[str, dict]:
    """Colour and marker of each name, arms first: an arm has its own, other names get those that no arm here has."""
    names = list(dict.fromkeys(names))
    arms = [arm for arm in ARM_COLOURS if arm in names]
    found = {arm: {"color": ARM_COLOURS[arm], "marker": ARM_MARKERS[arm]} for arm in arms}
    colours = cycle(OTHER_COLOURS if arms else list(ARM_COLOURS.values())[2:])
    markers = cycle(OTHER_MARKERS if arms else [*ARM_MARKERS.values()][2:] + ["<"])
    return found | {name: {"color": next(colours), "marker": next(markers)} for name in names if name not in found}


def titled(figure: Figure, title: str) -> Figure:
    """The figure with a title, and on its right one legend of all its axes if more than one thing has a name."""
    found = {}
    for axis in figure.axes:
        found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    if len(found) > 1:
        names = list(looks(found))
        figure.legend([found[name] for name in names], names, loc="outside right center", fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def panels(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str = "arm",
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    join: bool = True,
    marks: dict[str, str] | None = None,
    share: bool = True,
    front: Sequence[str] = (),
) -> Figure:
    """The points of a table: one panel per value of its column "panel", one colour and marker per value of `by`.

    Columns "low" and "high" become whiskers; if both are on one side of a point, they begin at it. If y holds names,
    they are listed downwards and whiskers go sideways. A row without x or a name is a dashed line across its panel.

    Args:
        table: a pandas table with one row per point.
        x, y, by: its columns.
        title, xlabel, ylabel: texts of the figure and of each panel.
        join: connect the points of one colour.
        marks: columns of further values of the same points, drawn in black, and their texts in the legend.
        share: all panels have the same axes.
        front: values of `by` to look at; the others are pale and have no whiskers. All are, if it is empty.
    """
    table = table if "panel" in table else table.assign(panel="")
    every, whiskers = looks(table[by]), "low" in table
    names = [] if pd.api.types.is_numeric_dtype(table[y]) else list(looks(table[y].dropna()))
    named = y == by  # then the axis names the colours, and each has a line to itself
    place, value = ("row", x) if names else (x, y)
    if names:
        table, y = table.assign(row=table[y].map({name: row for row, name in enumerate(names)})), "row"
    back = ~table[by].isin(front or table[by])
    table, behind = table[~back], table[back]
    every = {name: look for name, look in every.items() if name in set(table[by])}
    # Whiskers of several colours at one place are moved apart by so many points.
    several = table.dropna(subset=[place])[by].nunique() if whiskers and not named else 1
    step = min(11, 27 / max(1, several - 1)) if names else 3 if join else 7
    count, apart = table["panel"].nunique(), step * (several - 1)
    width = 6 if count == 1 else 4.2 if names else 3.6
    height = len(names) * max(0.4, (apart + 20) / 72) + 0.8 if names else 2.5 if count > 6 else 3.1
    same = {"sharex": share, "sharey": share or bool(names)}
    more = (1.8 if len(every) > 1 else 0, 0.4)
    wide = 2 if count == 4 and (names or not share) else 4 if share else 3
    figure, axes = _side_by_side(count, wide, (width, height), more, **same)
    for axis, (panel, here) in zip(axes, table.groupby("panel", sort=False), strict=True):
        for _, part in behind[behind["panel"] == panel].groupby(by, sort=False):
            axis.plot(part[x], part[y], "-" if join else ".", color="#dddddd", zorder=1, label="other arms")
        for number, (name, look) in enumerate(every.items()):
            part = here[here[by] == name].sort_values(place)
            for level in part.loc[part[place].isna(), value]:
                (axis.axvline if names else axis.axhline)(level, color=look["color"], linestyle="--", label=name)
            part = part.dropna(subset=[place, value])
            if part.empty:
                continue
            ends = [(part[value] - part["low"]).clip(0), (part["high"] - part[value]).clip(0)] if whiskers else None
            look = look | {"xerr" if names else "yerr": ends, "label": None if named else name}
            look |= {"linestyle": "-" if join else "none", "markevery": max(1, len(part) // 40)}
            drawn = axis.errorbar(part[x], part[y], **look, ms=5 if len(part) < 12 else 3, capsize=2).get_children()
            for sign, (column, text) in zip("|xs" if names else "_xs", (marks or {}).items(), strict=False):
                at = (part[column], part[y]) if names else (part[x], part[column])
                drawn += axis.plot(*at, sign, color="black", mfc="none", ms=8, mew=1.5, zorder=3, label=text)
            shift = step / 72 * (number - (several - 1) / 2) if several > 1 else 0
            move = ScaledTranslation(*((0, -shift) if names else (shift, 0)), figure.dpi_scale_trans)
            for artist in drawn:
                artist.set_transform(axis.transData + move)
        axis.set(title=panel, xlabel=xlabel)
        ticks = np.unique(here[x].dropna())
        if names:
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.locator_params(axis="x", nbins=4)
        else:
            axis.margins(x=0.05 + apart / 100 / width)
            if len(ticks) < 6 and (ticks % 1 == 0).all():
                axis.set_xticks(ticks)
    axes[0].set_ylabel(ylabel)
    return titled(figure, title)


def _side_by_side(count: int, wide: int, size: tuple[float, float], more: tuple[float, float], **options):
    """A figure of `count` axes of a size in inches, at most `wide` in a row, and more inches for legend and title."""
    wide = min(wide, count)
    tall = -(-count // wide)
    figure, axes = new_figure(tall, wide, (size[0] * wide + more[0], size[1] * tall + more[1]), **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def lines(table: pd.DataFrame, x: str, series: dict[str, str], title: str, ylabel: str) -> Figure:
    """Columns of a table over one of its columns; `series` maps column names to legend texts."""
    long = table.rename(columns=series).melt(x, list(series.values()), "series", "value")
    return panels(long, x, "value", "series", title, x, ylabel)


def histories(logs: dict, columns: dict, title: str, front: Sequence[str] = (), after: float = -1) -> Figure:
    """Monitors of one or more arms over the steps: one panel per column, titled by its text in `columns`.

    `front` is as in `panels`; steps up to `after` are left out.
    """
    parts = [
        pd.DataFrame({"panel": text, "arm": arm, "step": log["step"], "value": log[column]})
        for column, text in columns.items()
        for arm, log in logs.items()
        if column in log
    ]
    table = pd.concat(parts, ignore_index=True)
    table = table[~(table["step"] <= after) & table["value"].notna()]
    return panels(table, "step", "value", title=title, xlabel="step", share=False, front=front)


def stacked_bars(table: pd.DataFrame, title: str, label: str, colours: Sequence[str] | None = None) -> Figure:
    """One bar for each row of a table, the first on top, made of its columns."""
    figure, axes = new_figure(size=(8, 0.5 * len(table) + 1.4))
    look = {"color": colours} if colours else {"colormap": "cividis"}
    table.iloc[::-1].plot.barh(ax=axes[0, 0], stacked=True, width=0.75, legend=False, **look).set_xlabel(label)
    return titled(figure, title)


def grouped_bars(table: pd.DataFrame, title: str, label: str, chance: float) -> Figure:
    """The columns of a table side by side for each of its rows, with a line at chance."""
    figure, axes = new_figure(size=(8, 3.2))
    axis = table.plot.bar(ax=axes[0, 0], rot=0, width=0.7, legend=False, ylabel=label)
    for group in axis.containers:
        axis.bar_label(group, fmt="{:z.2f}", fontsize=9, padding=2, bbox={"fc": "white", "ec": "none", "pad": 1})
    axis.margins(y=0.12)
    axis.axhline(chance, color="black", linestyle=":")
    return titled(figure, title)


def forest(table: pd.DataFrame, title: str, xlabel: str, claimed: dict[str, float] | None = None) -> Figure:
    """Differences (columns name, panel, arm, difference, low, high), lines at 0, and in some panels what is claimed."""
    for panel, value in (claimed or {}).items():
        line = {"panel": [panel], "arm": f"claimed {value:+.2f}", "difference": value}
        table = pd.concat([table, pd.DataFrame(line)], ignore_index=True)
    figure = panels(table, "difference", "name", title=title, xlabel=xlabel, join=False)
    for axis in figure.axes:
        axis.axvline(0, color="black", linewidth=1)
    return figure


def grids(tables: dict, title: str, limits: tuple | None = None, numbers: str = ".3f", scale: str = "") -> Figure:
    """Tables, or plain matrices, as shaded grids side by side; colours part at zero if there are negative values.

    Args:
        tables: name and table; its index and columns are the labels.
        limits: one scale for all; else each has its own, from its least value to its greatest, or around zero.
        numbers: format of the number in each field; "" writes no numbers and no labels.
        scale: text of the common scale.
    """
    tables = {name: pd.DataFrame(table) for name, table in tables.items()}
    rows, columns = (max(table.shape[side] for table in tables.values()) for side in (0, 1))
    letters = max(len(str(label)) for table in tables.values() for label in table.index)
    size = (0.65 * columns + 0.1 * letters + 0.6, 0.42 * rows + 0.9) if numbers else (3.2, 3.2)
    figure, axes = _side_by_side(len(tables), 3, size, (0.8 if limits else 0, 0.5))
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        values = table.to_numpy(float)
        low, high = limits or (np.nanmin(values), np.nanmax(values))
        if low < 0:
            low, high = -max(-low, high), max(-low, high)
        shown = axis.imshow(values, cmap="PuOr" if low < 0 else "cividis", vmin=low, vmax=high, aspect="auto")
        axis.set_title(name, fontsize=10)
        axis.grid(False)
        if numbers:
            axis.set_xticks(range(table.shape[1]), table.columns)
            axis.set_yticks(range(len(table)), table.index)
            for (row, column), number in np.ndenumerate(values):
                dark = np.dot(shown.to_rgba(number)[:3], (0.3, 0.6, 0.1)) < 0.5
                text = f"{number:{'+' if low < 0 else ''}z{numbers}}"  # z: no -0.000
                axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    if limits:
        figure.colorbar(shown, ax=axes, shrink=0.8, label=scale)
    return titled(figure, title)


def image_sheet(groups: dict, title: str = "", heads: Sequence[str] = (), inches: float = 0.9) -> Figure:
    """Rows of pictures, one per named group, all as large as the largest; `heads` are texts above the columns.

    A picture is (H, W, C) uint8, (C, H, W) from 0 to 1, or (H, W), a map on a colour scale of its own.
    """
    rows = [[_colours(picture) for picture in group] for group in groups.values()]
    side, columns = max(len(picture) for row in rows for picture in row), max(map(len, rows))
    pitch = side + max(1, side // 14)
    sheet = np.full((pitch * len(rows), pitch * columns, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            place = np.arange(side) * len(picture) // side
            sheet[pitch * top :, pitch * left :][:side, :side] = picture[place][:, place]
    width = inches * columns + 0.3 + 0.09 * max(map(len, groups))
    figure, [[axis]] = new_figure(size=(width, inches * len(rows) + 0.3 + 0.3 * bool(heads)))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks(pitch * np.arange(len(rows)) + side / 2, list(groups))
    axis.set_xticks(pitch * np.arange(len(heads)) + side / 2, heads)
    axis.tick_params(length=0, labelsize=10)
    axis.xaxis.tick_top()
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return titled(figure, title)


def _colours(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a picture as `image_sheet` takes it."""
    if picture.ndim == 2:
        spread = max(np.ptp(picture), 1e-9)
        return matplotlib.colormaps["cividis"]((picture - picture.min()) / spread, bytes=True)[..., :3]
    if picture.dtype != np.uint8:
        picture = (255 * np.moveaxis(picture, 0, -1)).astype(np.uint8)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))
