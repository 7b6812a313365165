"""The study's figures, most of them forest plots of differences."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mocolayers.notebook.figures import forest, panels
from study import protocol
from study.as_released import CONTROLS
from study.report import compared, complete, gate, main_claim, main_sets, paired, pulls, repetitions, usual


def gains(scores: pd.DataFrame) -> Figure:
    """With few labels: the leading arms' AUC minus MoCo's, a row per data set and one for the mean.

    Before two repetitions of the comparison are complete: MoCo's minus that of no pretraining, a row per data set.
    """
    few = " and ".join(f"{fraction:.0%}" for fraction in protocol.FEW)
    if repetitions(scores) < 2:
        table = gate(scores).rename(columns={"dataset": "name"}).assign(arm="moco")
        table["panel"] = table["protocol"].map(protocol.NAMES)
        return forest(table, f"Does pretraining help at {few} of the labels?", "AUC minus that of no pretraining")
    rows, passed = complete(usual(scores)), gate(scores)
    leading = [arm for arm in rows["arm"].unique() if arm.split(" x")[0] in (*protocol.LEADING, "moco")]
    rows = main_sets(rows[rows["fraction"].isin(protocol.FEW) & rows["arm"].isin(leading)])
    alone = compared(paired(rows), ratio=protocol.RATIO).rename(columns={"judged_on": "name"})
    closed = set(passed.loc[~passed["passes"], ["dataset", "protocol"]].itertuples(index=False, name=None))
    shut = [pair in closed for pair in zip(alone["name"], alone["protocol"], strict=True)]
    alone["name"] = alone["name"].where(~np.array(shut), alone["name"] + " (cannot tell)")
    table = pd.concat([alone, main_claim(rows, passed).assign(name="mean")])
    table["panel"] = table["protocol"].map(protocol.NAMES) + table["fraction"].map(", {:.0%} of the labels".format)
    table = table.sort_values("panel", ascending=False, kind="stable")
    return forest(table, "Do intermediate layers help?", "AUC minus MoCo's", protocol.CLAIM)


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
    return forest(table, f"What a property of the released code does: {unit}", "released minus sound")
