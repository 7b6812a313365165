"""Every figure of the notebooks and the README: tables and arrays in, a matplotlib Figure out.

One arm has one colour everywhere. The palette is Okabe and Ito's, which colour-blind readers can tell apart.
Importing this module sets the look of all figures of a notebook.
"""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

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


PIXEL_COLOUR = "#7B4A12"


MODE_NAMES = {"linear": "linear evaluation", "finetune": "fine-tuning"}


STAGE_COLOURS = ("#fcbba1", "#fb6a4a", "#cb181d", "#67000d")


STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


plt.rcParams.update(STYLE)


def show(figure: Figure, alt: str, photos: bool = False) -> None:
    """Display a figure in a notebook with a text for readers who cannot see it; sheets of photos as JPEG, a fifth."""
    form = "jpeg" if photos else "png"
    display(Image(rendered(figure, form), format=form, alt=alt))


def rendered(figure: Figure, form: str = "png", quick: bool = False) -> bytes:
    """A figure as the bytes of a picture file; `quick` compresses a PNG less."""
    picture = io.BytesIO()
    figure.savefig(picture, format=form, pil_kwargs={"compress_level": 1} if quick else None)
    return picture.getvalue()


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), layout: str = "constrained", **options
) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes; pyplot does not know it, so it is shown once, and threads may make it."""
    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _panels(count: int, wide: int, size: tuple[float, float], room: tuple[float, float], **options):
    """A figure of `count` panels of a size in inches, at most `wide` side by side, with room beside and above them."""
    wide = min(wide, count)
    tall = -(-count // wide)
    figure, axes = new_figure(tall, wide, (size[0] * wide + room[0], size[1] * tall + room[1]), **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def _arms(table: pd.DataFrame) -> list[str]:
    """The arms in a table's column "arm", in the order of the palette."""
    return [arm for arm in ARM_COLOURS if arm in set(table["arm"])]


def _titled(figure: Figure, title: str, explained=None) -> Figure:
    """The figure with a title, and on its right the legend of one of its axes."""
    if explained is not None:
        figure.legend(*explained.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def _picture(axis, image: np.ndarray) -> None:
    """Show (H, W, C) uint8 or (C, H, W) float in [0, 1]."""
    if image.dtype != np.uint8:
        image = np.moveaxis(image, 0, -1)
    limits = {"vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1}
    axis.imshow(image.squeeze(), cmap="gray", interpolation="nearest", **limits)
    axis.set_xticks([]), axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def image_sheet(groups: dict[str, np.ndarray], columns: int = 10, title: str = "") -> Figure:
    """Rows of pictures, one row per named group of images (n, H, W, C)."""
    figure, axes = new_figure(len(groups), columns, (columns * 0.95, len(groups) * 1.15 + 0.4))
    for line, (name, images) in zip(axes, groups.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            _picture(axis, image)
        for axis in line[len(images) :]:
            axis.axis("off")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return _titled(figure, title)


def strips(groups: dict[str, np.ndarray], columns: int, title: str) -> Figure:
    """`image_sheet` for many groups of images (n, H, W, C): each is one picture, which draws ten times as fast."""
    figure, axes = new_figure(len(groups), 1, (columns * 0.8 + 2, len(groups) * 0.85 + 0.4))
    for axis, (name, images) in zip(axes[:, 0], groups.items(), strict=True):
        line = np.full((images.shape[1], columns, *images.shape[2:]), 255, np.uint8)
        line[:, : len(images)] = images.swapaxes(0, 1)
        _picture(axis, line.reshape(len(line), -1, images.shape[3]))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return _titled(figure, title)


def view_sheet(originals: np.ndarray, first: np.ndarray, second: np.ndarray, title: str = "") -> Figure:
    """Each original (n, H, W, C) above its two views (n, C, H, W)."""
    figure, axes = new_figure(3, len(originals), (len(originals) * 1.0, 3.6))
    for column, (image, x_q, x_k) in enumerate(zip(originals, first, second, strict=True)):
        for line, picture in enumerate((image, x_q, x_k)):
            _picture(axes[line, column], picture)
    for axis, name in zip(axes[:, 0], ("image", "view q", "view k"), strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return _titled(figure, title)


def stacked_bars(
    table: pd.DataFrame,
    title: str,
    xlabel: str = "images (times labels, where an image may have several)",
    colours: Sequence[str] | None = None,
) -> Figure:
    """One stacked bar per row of a table of counts or shares, one colour per column."""
    figure, axes = new_figure(size=(8, 0.5 * len(table) + 1.6))
    if colours is None:
        colours = plt.get_cmap("cividis")(np.linspace(0.1, 0.9, table.shape[1]))
    left = np.zeros(len(table))
    for name, colour in zip(table.columns, colours, strict=True):
        axes[0, 0].barh(table.index, table[name], left=left, color=colour, label=name)
        left += table[name].fillna(0).to_numpy()
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel=xlabel)
    return _titled(figure, title, axes[0, 0])


def paired_bars(
    pairs: dict[str, tuple[float, float]], names: tuple[str, str], title: str, ylabel: str, level: float | None = None
) -> Figure:
    """Two bars for each named pair of numbers, and a dotted line at a level such as chance."""
    figure, axes = new_figure(size=(8, 3.2))
    for place, (name, colour) in enumerate(zip(names, ("#0072B2", "#D55E00"), strict=True)):
        x = np.arange(len(pairs)) + (place - 0.5) * 0.36
        bars = axes[0, 0].bar(x, [pair[place] for pair in pairs.values()], 0.34, color=colour, label=name)
        axes[0, 0].bar_label(bars, fmt="%.2f", fontsize=9)
    if level is not None:
        axes[0, 0].axhline(level, color="black", linestyle=":", linewidth=1)
    axes[0, 0].set_xticks(range(len(pairs)), list(pairs))
    highest = max(1, *(value for pair in pairs.values() for value in pair))
    axes[0, 0].set(ylim=(0, 1.08 * highest), ylabel=ylabel)
    return _titled(figure, title, axes[0, 0])


def interval_histogram(
    values: np.ndarray, intervals: dict[str, tuple[float, float]], title: str, xlabel: str
) -> Figure:
    """A histogram of resamples with named intervals below it."""
    figure, axes = new_figure(size=(8, 3.2))
    tallest = axes[0, 0].hist(values, 40, color="#cccccc")[0].max()
    for number, ((name, ends), colour) in enumerate(zip(intervals.items(), ("#0072B2", "#D55E00"), strict=False)):
        height = -0.09 * (number + 1) * tallest
        axes[0, 0].plot(ends, [height] * 2, "|-", color=colour, linewidth=4, markersize=10, label=name)
    axes[0, 0].set(xlabel=xlabel, ylabel="resamples", title=title)
    axes[0, 0].legend(fontsize=9)
    return figure


def patient_strip(data_rows: int, subsets: dict[str, np.ndarray], title: str) -> Figure:
    """Which training images (by position, 0..data_rows) each named subset holds."""
    figure, axes = new_figure(size=(9, 0.45 * len(subsets) + 1.3))
    for line, positions in enumerate(subsets.values()):
        axes[0, 0].vlines(positions, line - 0.4, line + 0.4, color="#0072B2", linewidth=0.6)
    axes[0, 0].set_yticks(range(len(subsets)), list(subsets))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlim=(0, data_rows), xlabel="training images, those of one patient side by side", title=title)
    axes[0, 0].grid(False)
    return figure


def lines(
    table: pd.DataFrame, x: str, series: dict[str, str], title: str, ylabel: str, colours: Sequence[str] | None = None
) -> Figure:
    """Columns of a table over one of its columns; `series` maps column names to legend texts."""
    figure, axes = new_figure(size=(8, 3.6))
    palette = list(colours or list(ARM_COLOURS.values())[2:])
    for number, (column, label) in enumerate(series.items()):
        known = table[[x, column]].dropna()
        axes[0, 0].plot(known[x], known[column], "o-", ms=3, color=palette[number % len(palette)], label=label)
    axes[0, 0].set(xlabel=x, ylabel=ylabel)
    return _titled(figure, title, axes[0, 0] if len(series) > 1 else None)


def softmax_bars(curves: dict[str, np.ndarray], title: str) -> Figure:
    """Probabilities over the positive (first bar) and the hardest negatives, one panel per name."""
    figure, axes = new_figure(1, len(curves), (3.2 * len(curves), 3), sharey=True)
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        shown = np.concatenate([values[:1], np.sort(values[1:])[::-1][:24]])
        axis.bar(range(len(shown)), shown, color=["#D55E00"] + ["#0072B2"] * (len(shown) - 1))
        axis.set(title=name, xlabel="own key, then hardest others")
    axes[0, 0].set_ylabel("probability")
    return _titled(figure, title)


def histories(tables: dict[str, pd.DataFrame], columns: dict[str, str], title: str) -> Figure:
    """Monitors of several arms: one panel per column, one line per arm in the arm's colour."""
    figure, axes = _panels(len(columns), 3, (3.5, 2.9), (1.4 if len(tables) > 1 else 0, 0.3))
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for arm, table in tables.items():
            if column not in table:
                continue
            known = table[["step", column]].dropna()
            axis.plot(known["step"], known[column], "o-", ms=2.5, color=ARM_COLOURS.get(arm), label=arm)
        axis.set(title=label, xlabel="step")
    return _titled(figure, title, axes[0] if len(tables) > 1 else None)


def matrices(items: dict[str, np.ndarray], title: str) -> Figure:
    """Correlation matrices side by side on one diverging scale."""
    figure, axes = new_figure(1, len(items), (3.4 * len(items), 3.4))
    for axis, (name, matrix) in zip(axes[0], items.items(), strict=True):
        shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.grid(False)
        axis.set(xlabel="feature of view k", ylabel="feature of view q")
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8, label="correlation")
    return _titled(figure, title)


def label_curves(summary: pd.DataFrame, title: str) -> Figure:
    """AUC over the label fraction, one panel per mode and one line per arm, with whiskers.

    Args:
        summary: columns arm, mode, fraction, auc, low, high.
    """
    modes = [mode for mode in MODE_NAMES if mode in set(summary["mode"])]
    figure, axes = new_figure(1, len(modes), (4.6 * len(modes) + 1, 4), sharey=True)
    arms = _arms(summary)
    for axis, mode in zip(axes[0], modes, strict=True):
        for number, arm in enumerate(arms):
            part = summary[(summary["mode"] == mode) & (summary["arm"] == arm)].sort_values("fraction")
            if part.empty:
                continue
            x = part["fraction"] * 100 * 1.06 ** (number - len(arms) / 2)
            whiskers = [part["auc"] - part["low"], part["high"] - part["auc"]]
            axis.errorbar(x, part["auc"], whiskers, fmt="o-", ms=4, capsize=2, color=ARM_COLOURS[arm], label=arm)
        axis.set(xscale="log", xlabel="labels used (%)", title=MODE_NAMES[mode])
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes[0, 0].set_ylabel("test AUC")
    handles = {}
    for axis in axes[0]:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
    return _titled(figure, title)


def forest(table: pd.DataFrame, title: str, xlabel: str, claimed: float | None = None) -> Figure:
    """Paired differences with intervals and a line at no difference.

    Args:
        table: columns name, panel, arm, difference, low, high; one panel per value of "panel".
        claimed: a difference to draw a dashed line at.
    """
    panels = list(dict.fromkeys(table["panel"]))
    names = list(dict.fromkeys(table["name"]))
    arms = _arms(table)
    size = (4 * len(panels) + 4, 0.2 * len(arms) * len(names) + 1.6)
    figure, axes = new_figure(1, len(panels), size, sharey=True, sharex=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, arm in enumerate(arms):
            part = table[(table["panel"] == panel) & (table["arm"] == arm)]
            y = [names.index(name) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms) for name in part["name"]]
            whiskers = [part["difference"] - part["low"], part["high"] - part["difference"]]
            axis.errorbar(
                part["difference"], y, xerr=whiskers, fmt="o", ms=4, capsize=2, color=ARM_COLOURS[arm], label=arm
            )
        axis.axvline(0, color="black", linewidth=1)
        if claimed is not None:
            axis.axvline(claimed, color="black", linewidth=1, linestyle="--", label=f"claimed {claimed:+.2f}")
        axis.set(title=panel, xlabel=xlabel)
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return _titled(figure, title, axes[0, 0])


def activation_maps(images: np.ndarray, maps: dict[str, list[np.ndarray]], title: str) -> Figure:
    """One image and the mean activation of each stage, one row per encoder.

    Args:
        images: (H, W, C) uint8, one for all rows.
        maps: per encoder four (H_l, W_l) arrays.
    """
    figure, axes = new_figure(len(maps), 5, (8.5, 1.75 * len(maps) + 0.5))
    for line, (name, stages) in zip(axes, maps.items(), strict=True):
        _picture(line[0], images)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        for number, (axis, stage) in enumerate(zip(line[1:], stages, strict=True), start=1):
            axis.imshow(stage, cmap="cividis", interpolation="nearest")
            axis.set_title(f"stage {number}: {stage.shape[0]} x {stage.shape[1]}", fontsize=9, fontweight="normal")
            axis.set_xticks([]), axis.set_yticks([])
            axis.grid(False)
    return _titled(figure, title)


def stage_curves(summary: pd.DataFrame, title: str, ylabel: str = "test AUC") -> Figure:
    """A value over the four stages: one panel per value of "panel", one line per arm, whiskers, pixels as a level.

    Args:
        summary: columns panel, arm, stage (0 for pixels), value, low, high.
    """
    panels = list(dict.fromkeys(summary["panel"]))
    arms = _arms(summary)
    figure, axes = new_figure(1, len(panels), (3.5 * len(panels) + 1.6, 3.8), sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        part = summary[summary["panel"] == panel]
        for number, arm in enumerate(arms):
            line = part[part["arm"] == arm].sort_values("stage")
            whiskers = [line["value"] - line["low"], line["high"] - line["value"]]
            x = line["stage"] + (number - (len(arms) - 1) / 2) * 0.06
            axis.errorbar(x, line["value"], whiskers, fmt="o-", ms=4, capsize=2, color=ARM_COLOURS[arm], label=arm)
        for value in part.loc[part["arm"] == "pixels", "value"]:
            axis.axhline(value, color=PIXEL_COLOUR, linestyle="--", label="raw pixels")
        axis.set(xticks=[1, 2, 3, 4], xlabel="stage", title=panel)
    axes[0, 0].set_ylabel(ylabel)
    return _titled(figure, title, axes[0, 0])


def number_grids(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """Tables of numbers as shaded grids side by side, rows and columns as they are to be labelled.

    Each is on its own scale: from the least value to the greatest, or around zero if one is negative.
    """
    widest = max(table.shape[1] for table in tables.values())
    size = (len(tables) * (0.85 * widest + 1.9), 0.42 * max(len(table) for table in tables.values()) + 1.5)
    figure, axes = new_figure(1, len(tables), size)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        values = table.to_numpy(float)
        around_zero = np.nanmin(values) < 0
        limit = np.nanmax(np.abs(values))
        limits = (-limit, limit) if around_zero else (np.nanmin(values), np.nanmax(values))
        colours = plt.get_cmap("PuOr" if around_zero else "cividis")
        shown = axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = np.dot(shown.to_rgba(value)[:3], (0.3, 0.6, 0.1)) < 0.5
            text = f"{value:+.3f}" if around_zero else f"{value:.3f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axis.set_xticks(range(table.shape[1]), table.columns)
        axis.set_yticks(range(len(table)), table.index)
        axis.set_title(name, fontsize=10)
        axis.grid(False)
    return _titled(figure, title)


def similarity_settings(table: pd.DataFrame, settings: dict[str, tuple[str, str]], title: str) -> Figure:
    """CKA of each stage under several settings, each beside its own null.

    Args:
        table: one row per stage, with the columns that `settings` names.
        settings: legend text -> (column of the CKA, column of its null).
    """
    figure, axes = new_figure(1, len(settings), (2.7 * len(settings) + 0.6, 3.3), sharey=True)
    for axis, (name, (value, null)) in zip(axes[0], settings.items(), strict=True):
        axis.bar(table["stage"], table[value], color=STAGE_COLOURS[1], width=0.7, label="before against after")
        axis.bar(table["stage"], table[null], color="none", edgecolor="black", hatch="///", width=0.7, label="null")
        axis.set(title=name, xlabel="stage", xticks=table["stage"], ylim=(min(0, table[null].min()), 1.05))
    axes[0, 0].set_ylabel("CKA")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=9)
    return _titled(figure, title)


def reuse_points(table: pd.DataFrame, title: str) -> Figure:
    """CKA before against after fine-tuning: one panel per label fraction, dots per arm, ticks at each arm's twin.

    Args:
        table: columns fraction, arm, stage, linear, low, high, null, twin.
    """
    fractions, arms = sorted(table["fraction"].unique()), _arms(table)
    figure, axes = new_figure(1, len(fractions), (4.3 * len(fractions) + 1.6, 3.9), sharey=True)
    for axis, fraction in zip(axes[0], fractions, strict=True):
        for number, arm in enumerate(arms):
            part = table[(table["arm"] == arm) & (table["fraction"] == fraction)]
            x = part["stage"] + (number - (len(arms) - 1) / 2) * 0.12
            whiskers = [part["linear"] - part["low"], part["high"] - part["linear"]]
            axis.errorbar(x, part["linear"], whiskers, fmt="o", ms=4, capsize=2, color=ARM_COLOURS[arm], label=arm)
            axis.plot(x, part["twin"], "_", ms=9, mew=2, color=ARM_COLOURS[arm])
        null = table.loc[table["fraction"] == fraction, "null"].mean()
        axis.axhline(null, color="black", linestyle=":", label="null: rows permuted")
        axis.plot([], [], "_", ms=9, mew=2, color="black", label="twin: two fine-tunings")
        axis.set(xticks=[1, 2, 3, 4], xlabel="stage", title=f"fine-tuned on {fraction:.0%} of the labels")
    axes[0, 0].set_ylabel("debiased linear CKA")
    return _titled(figure, title, axes[0, 0])


def scatter(table: pd.DataFrame, x: str, y: str, title: str, xlabel: str, ylabel: str) -> Figure:
    """Two columns against each other, arms in their colours, stages as marker shapes."""
    figure, axes = new_figure(size=(7.5, 4))
    axis = axes[0, 0]
    for (arm, stage), part in table.groupby(["arm", "stage"]):
        axis.scatter(part[x], part[y], color=ARM_COLOURS[arm], marker="os^D"[stage - 1], s=36)
    for arm in _arms(table):
        axis.plot([], [], "o", color=ARM_COLOURS[arm], label=arm)
    for stage, marker in enumerate("os^D", start=1):
        axis.plot([], [], marker, color="none", markeredgecolor="black", label=f"stage {stage}")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return _titled(figure, title, axis)


def similarity_maps(items: dict[str, np.ndarray], title: str, ylabel: str, xlabel: str) -> Figure:
    """4 x 4 matrices of CKA between the stages of two encoders, with numbers."""
    figure, axes = _panels(len(items), 3, (2.9, 2.8), (0.8, 0.4), sharex=True, sharey=True)
    for axis, (name, matrix) in zip(axes, items.items(), strict=True):
        shown = axis.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(matrix):
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(4), "1234")
        axis.set_yticks(range(4), "1234")
        axis.grid(False)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="debiased linear CKA")
    return _titled(figure, title)


def block_matrix(matrix: np.ndarray, names: list[str], title: str) -> Figure:
    """A matrix of CKA between all stages of all encoders, four lines per encoder."""
    figure, axes = new_figure(size=(7.6, 6.4))
    shown = axes[0, 0].imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    for edge in np.arange(4, len(matrix), 4) - 0.5:
        axes[0, 0].axhline(edge, color="white", linewidth=1.5)
        axes[0, 0].axvline(edge, color="white", linewidth=1.5)
    places = np.arange(len(names)) * 4 + 1.5
    axes[0, 0].set_xticks(places, names, rotation=30, ha="right")
    axes[0, 0].set_yticks(places, names)
    axes[0, 0].set(title=title)
    axes[0, 0].grid(False)
    figure.colorbar(shown, ax=axes[0, 0], shrink=0.8, label="debiased linear CKA; stages 1 to 4 in each block")
    return figure


def cdf_gap(panels: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, str], title: str) -> Figure:
    """Cumulative distributions of two models' probabilities, with the largest gap between them marked.

    Args:
        panels: title -> the two models' (n,) probabilities.
        names: what the two are, for the legend.
    """
    figure, axes = new_figure(1, len(panels), (4.2 * len(panels) + 0.4, 3.7), sharey=True)
    for axis, (name, (first, second)) in zip(axes[0], panels.items(), strict=True):
        every = np.unique(np.concatenate([first, second]))
        curves = [np.searchsorted(np.sort(p), every, side="right") / len(p) for p in (first, second)]
        for curve, colour, label in zip(curves, ("#D55E00", "#0072B2"), names, strict=True):
            axis.step(np.r_[0, every, 1], np.r_[0, curve, 1], where="post", color=colour, label=label)
        widest = np.abs(curves[0] - curves[1]).argmax()
        low, high = sorted((curves[0][widest], curves[1][widest]))
        axis.vlines(every[widest], low, high, color="black", linewidth=3)
        side = "right" if every[widest] > 0.5 else "left"
        axis.text(every[widest], (low + high) / 2, f"  D = {high - low:.3f}  ", ha=side, va="center", fontweight="bold")
        axis.set(title=name, xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("share of test images at or below")
    axes[0, 0].legend(fontsize=9, loc="lower right")
    return _titled(figure, title)


def distance_dots(table: pd.DataFrame, marks: dict[str, tuple[str, str]], title: str, xlabel: str) -> Figure:
    """A distance with its interval beside what it has to be read against: one panel per "panel", one line per arm.

    Args:
        table: columns panel, arm, ks, low, high and those that `marks` names.
        marks: column -> (marker, legend text).
    """
    panels = list(dict.fromkeys(table["panel"]))
    arms = _arms(table)
    size = (4.2 * len(panels) + 1.8, 0.45 * len(arms) + 1.7)
    figure, axes = new_figure(1, len(panels), size, sharey=True, sharex=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        part = table[table["panel"] == panel]
        for row in part.itertuples():
            y, colour = arms.index(row.arm), ARM_COLOURS[row.arm]
            axis.plot([row.low, row.high], [y, y], color=colour, linewidth=2)
            axis.plot(row.ks, y, "o", color=colour, ms=7)
        for column, (marker, text) in marks.items():
            y = [arms.index(arm) for arm in part["arm"]]
            axis.plot(part[column], y, marker, color="black", mfc="none", ms=8, mew=1.5, label=text)
        axis.set(title=panel, xlabel=xlabel)
    axes[0, 0].set_xlim(left=-0.01)
    axes[0, 0].plot([], [], "o-", color="#888888", label="few labels against all")
    axes[0, 0].set_yticks(range(len(arms)), arms)
    axes[0, 0].invert_yaxis()
    return _titled(figure, title, axes[0, 0])


def reliability_curves(panels: dict[str, dict[str, pd.DataFrame]], title: str) -> Figure:
    """Observed rate over predicted probability: one panel per name, one line per arm, dot area is the share of images.

    Args:
        panels: title -> arm -> columns probability, observed, share.
    """
    figure, axes = new_figure(1, len(panels), (3.9 * len(panels) + 1.6, 3.9), sharey=True, sharex=True)
    for axis, (name, arms) in zip(axes[0], panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
        for arm, table in arms.items():
            axis.plot(table["probability"], table["observed"], color=ARM_COLOURS[arm], linewidth=1, label=arm)
            axis.scatter(table["probability"], table["observed"], 300 * table["share"], ARM_COLOURS[arm], alpha=0.6)
        axis.set(title=name, xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("observed rate")
    return _titled(figure, title, axes[0, 0])


def released_dots(table: pd.DataFrame, title: str) -> Figure:
    """Two ways to the same number: one panel per "panel", one line per name, dots of every seed and their joined means.

    Args:
        table: columns panel, label (of the panel's axis), name, as_released, sound; a row per seed.
    """
    panels = list(table.groupby("panel", sort=False))
    most = max(part["name"].nunique() for _, part in panels)
    figure, axes = _panels(len(panels), 2, (5, 0.4 * most + 1.3), (1, 0.6))
    ways = {"as_released": ("#CC79A7", "o", "as released", -0.1), "sound": ("#333333", "D", "soundly", 0.1)}
    for axis, (panel, part) in zip(axes, panels, strict=True):
        means = part.groupby("name", sort=False)[list(ways)].mean()
        for column, (colour, marker, label, shift) in ways.items():
            y = [list(means.index).index(name) + shift for name in part["name"]]
            axis.plot(part[column], y, marker, ms=4, color=colour, alpha=0.35)
            axis.plot(means[column], np.arange(len(means)) + shift, marker, ms=8, color=colour, label=label)
        for y, row in enumerate(means.itertuples()):
            axis.plot([row.as_released, row.sound], [y - 0.1, y + 0.1], color="#888888", linewidth=1, zorder=1)
            text = f"{row.as_released - row.sound:+.3f}"
            axis.annotate(text, (1, y), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize=9)
        axis.set_yticks(range(len(means)), means.index, fontsize=9)
        axis.set_ylim(len(means) - 0.5, -0.5)
        axis.margins(x=0.12)
        axis.set_xlim(right=axis.get_xlim()[1] + 0.15 * np.ptp(axis.get_xlim()))  # room for the differences
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(part["label"].iloc[0], fontsize=9)
        axis.set_title(panel, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return _titled(figure, title)
