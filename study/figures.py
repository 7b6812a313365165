"""The study's figures, most of them forest plots of differences."""

import pandas as pd
from matplotlib.figure import Figure

from mocolayers.notebook.figures import forest, panels
from study import protocol
from study.as_released import CONTROLS
from study.report import gate, leading_gains, pulls


def gains(scores: pd.DataFrame) -> Figure:
    """`leading_gains`, a row per data set; if there are none, MoCo's AUC minus that of no pretraining."""
    table = leading_gains(scores, passed := gate(scores))
    if table.empty:
        return gate_by_seeds(passed)
    table = table.assign(name=table["judged_on"], panel=table["protocol"].map(protocol.NAMES))
    table, few = table.sort_values("protocol", ascending=False, kind="stable"), protocol.FEW[0]
    title = f"Do losses on intermediate layers help with {few:.0%} of the labels? {table['seeds'].max()} repetitions"
    return forest(table, title, "AUC minus MoCo's", dict.fromkeys(table["panel"], protocol.CLAIM))


def gate_by_seeds(passed: pd.DataFrame) -> Figure:
    """MoCo's AUC minus that of no pretraining, per data set: the mean of all seeds, the lowest and the highest."""
    table = passed.drop(columns="difference").rename(columns={"dataset": "name", "mean": "difference"})
    table = table.assign(arm="moco", panel=table["protocol"].map(protocol.NAMES))
    title = f"Does pretraining help? Mean, lowest and highest of {table['seeds'].max()} seeds"
    return forest(table, title, "AUC minus that of no pretraining")


def gain_by_pull(scores: pd.DataFrame) -> Figure:
    """AUC minus MoCo's over the share of the gradient that the stage losses hold, a panel per data set."""
    table = pulls(scores).rename(columns={"dataset": "panel"}).sort_values("pull")
    text = {"xlabel": "share of the gradient", "ylabel": "AUC minus MoCo's"}
    figure = panels(table, "pull", "gain", title="Does a harder pull help?", **text)
    for axis in figure.axes:
        axis.axhline(0, color="black", linewidth=1)
    return figure


def released(moved: pd.DataFrame, unit: str = "AUC") -> Figure:
    """How far each property of the released code moves its result, in panels by data set, from `as_released.moved`."""
    shown = {(code, quantity) for code, (_, _, quantity, measured) in CONTROLS.items() if measured == unit}
    table = moved[[key in shown for key in zip(moved["code"], moved["quantity"], strict=True)]]
    table = table.assign(name=table["code"] + ": " + table["property"], panel=table["judged_on"])
    table[["low", "high"]] = table[["low", "high"]].clip(-1, 1)  # no AUC and no share differs by more
    return forest(table, f"What a property of the released code does: {unit}", "released minus sound")
