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
}
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
    "figure.constrained_layout.use": True,
}
plt.rcParams.update(STYLE)


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with a text for readers who cannot see it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    display(Image(picture.getvalue(), alt=alt))


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), **options):
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    plt.close(figure)  # the notebook shows the returned figure once; pyplot must not show it again
    return figure, axes


def _picture(axis, image: np.ndarray, title: str = "", colour: str | None = None) -> None:
    """Show (H, W, C) uint8 or (C, H, W) float in [0, 1]."""
    if image.dtype != np.uint8:
        image = np.moveaxis(image, 0, -1)
    limits = {"vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1}
    axis.imshow(image.squeeze(), cmap="gray", interpolation="nearest", **limits)
    axis.set_title(title, fontsize=9, fontweight="normal", loc="center")
    axis.set_xticks([]), axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=3)


def image_sheet(groups: dict[str, np.ndarray], columns: int = 10, title: str = "") -> Figure:
    """Rows of pictures, one row per named group of images (n, H, W, C)."""
    figure, axes = _figure(len(groups), columns, (columns * 0.95, len(groups) * 1.15 + 0.4))
    for line, (name, images) in zip(axes, groups.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            _picture(axis, image)
        for axis in line[len(images) :]:
            axis.axis("off")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def view_sheet(originals: np.ndarray, first: np.ndarray, second: np.ndarray, title: str = "") -> Figure:
    """Each original (n, H, W, C) above its two views (n, C, H, W)."""
    figure, axes = _figure(3, len(originals), (len(originals) * 1.0, 3.6))
    for column, (image, x_q, x_k) in enumerate(zip(originals, first, second, strict=True)):
        for line, picture in enumerate((image, x_q, x_k)):
            _picture(axes[line, column], picture)
    for axis, name in zip(axes[:, 0], ("image", "view q", "view k"), strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def split_bars(counts: pd.DataFrame, title: str) -> Figure:
    """Images per class (columns) and split (rows)."""
    figure, axes = _figure(size=(8, 0.5 * len(counts) + 1.6))
    left = np.zeros(len(counts))
    colours = plt.get_cmap("cividis")(np.linspace(0.1, 0.9, counts.shape[1]))
    for name, colour in zip(counts.columns, colours, strict=True):
        axes[0, 0].barh(counts.index, counts[name], left=left, color=colour, label=name)
        left += counts[name].to_numpy()
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="images (times labels, where an image may have several)", title=title)
    axes[0, 0].legend(fontsize=8, ncols=1 if counts.shape[1] < 4 else 2, loc="lower right")
    return figure


def patient_strip(data_rows: int, subsets: dict[str, np.ndarray], title: str) -> Figure:
    """Which training images (by position, 0..data_rows) each named subset holds."""
    figure, axes = _figure(size=(9, 0.45 * len(subsets) + 1.3))
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
    figure, axes = _figure(size=(8, 3.6))
    palette = list(colours or list(ARM_COLOURS.values())[2:])
    for number, (column, label) in enumerate(series.items()):
        known = table[[x, column]].dropna()
        axes[0, 0].plot(known[x], known[column], "o-", ms=3, color=palette[number % len(palette)], label=label)
    axes[0, 0].set(xlabel=x, ylabel=ylabel, title=title)
    if len(series) > 1:
        axes[0, 0].legend()
    return figure


def softmax_bars(curves: dict[str, np.ndarray], title: str, most: int = 25) -> Figure:
    """Probabilities over the positive (first bar) and the hardest negatives, one panel per name."""
    figure, axes = _figure(1, len(curves), (3.2 * len(curves), 3), sharey=True)
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        shown = np.concatenate([values[:1], np.sort(values[1:])[::-1][: most - 1]])
        axis.bar(range(len(shown)), shown, color=["#D55E00"] + ["#0072B2"] * (len(shown) - 1))
        axis.set(title=name, xlabel="own key, then hardest others")
    axes[0, 0].set_ylabel("probability")
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def histories(tables: dict[str, pd.DataFrame], columns: dict[str, str], title: str) -> Figure:
    """Monitors of several arms: one panel per column, one line per arm in the arm's colour."""
    wide = min(3, len(columns))
    tall = -(-len(columns) // wide)
    figure, axes = _figure(tall, wide, (3.6 * wide, 2.9 * tall + 0.3))
    for axis, (column, label) in zip(axes.flat, columns.items(), strict=False):
        for arm, table in tables.items():
            if column not in table:
                continue
            known = table[["step", column]].dropna()
            axis.plot(known["step"], known[column], "o-", ms=2.5, color=ARM_COLOURS.get(arm), label=arm)
        axis.set(title=label, xlabel="step")
    for axis in list(axes.flat)[len(columns) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def matrices(items: dict[str, np.ndarray], title: str, limit: float = 1.0) -> Figure:
    """Square matrices side by side on one diverging scale from -limit to limit."""
    figure, axes = _figure(1, len(items), (3.4 * len(items), 3.4))
    for axis, (name, matrix) in zip(axes[0], items.items(), strict=True):
        shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.grid(False)
        axis.set(xlabel="feature of view k", ylabel="feature of view q")
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8, label="correlation")
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def stacked_shares(shares: pd.DataFrame, title: str) -> Figure:
    """Gradient shares: one bar per row (arm), one colour per column (loss term)."""
    figure, axes = _figure(size=(8, 0.45 * len(shares) + 1.5))
    left = np.zeros(len(shares))
    for name, colour in zip(shares.columns, ("#0072B2", *STAGE_COLOURS), strict=False):
        axes[0, 0].barh(shares.index, shares[name], left=left, color=colour, label=name)
        left += shares[name].fillna(0).to_numpy()
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlim=(0, 1), xlabel="share of the gradient norm on the encoder", title=title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def label_curves(summary: pd.DataFrame, title: str) -> Figure:
    """AUC over the label fraction, one panel per mode and one line per arm, with whiskers.

    Args:
        summary: columns arm, mode, fraction, auc, low, high.
    """
    modes = [mode for mode in MODE_NAMES if mode in set(summary["mode"])]
    figure, axes = _figure(1, len(modes), (4.6 * len(modes) + 1, 4), sharey=True)
    arms = [arm for arm in ARM_COLOURS if arm in set(summary["arm"])]
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
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure


def forest(table: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """Paired differences with intervals and a line at no difference.

    Args:
        table: columns name, panel, arm, difference, low, high; one panel per value of "panel".
    """
    panels = list(dict.fromkeys(table["panel"]))
    names = list(dict.fromkeys(table["name"]))
    arms = [arm for arm in ARM_COLOURS if arm in set(table["arm"])]
    size = (4.2 * len(panels) + 1.2, 0.28 * len(arms) * len(names) + 1.6)
    figure, axes = _figure(1, len(panels), size, sharey=True, sharex=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, arm in enumerate(arms):
            part = table[(table["panel"] == panel) & (table["arm"] == arm)]
            y = [names.index(name) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms) for name in part["name"]]
            whiskers = [part["difference"] - part["low"], part["high"] - part["difference"]]
            axis.errorbar(
                part["difference"], y, xerr=whiskers, fmt="o", ms=4, capsize=2, color=ARM_COLOURS[arm], label=arm
            )
        axis.axvline(0, color="black", linewidth=1)
        axis.set(title=panel, xlabel=xlabel)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
    return figure
