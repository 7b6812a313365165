"""The study's figures, all of them forest plots of differences."""

import pandas as pd
from matplotlib.figure import Figure

from mocolayers.notebook.figures import forest
from study import protocol
from study.as_released import CONTROLS
from study.report import compared, main_claim, paired, usual


def gains(scores: pd.DataFrame) -> Figure:
    """AUC minus MoCo's at the smallest label fraction: a line per data set, and one for the mean in each series."""
    rows = usual(scores)
    few = rows["fraction"].min()
    alone = rows[(rows["fraction"] == few) & ~rows["arm"].isin(protocol.UNTRAINED)]
    parts = [compared(paired(alone)).assign(name=lambda table: table["judged_on"])]
    for series in [name for name in protocol.SERIES if name in set(scores["series"])]:
        parts.append(main_claim(usual(scores, series)).assign(name=f"mean, {protocol.SERIES[series].title}"))
    table = pd.concat(parts)
    table = table.assign(panel=table["protocol"].map(protocol.NAMES)).sort_values(
        "panel", ascending=False, kind="stable"
    )
    return forest(table, f"Do intermediate layers help at {few:.0%} of the labels?", "AUC minus MoCo's", protocol.CLAIM)


def released(moved: pd.DataFrame, unit: str = "AUC") -> Figure:
    """How far each property of the released code moves its result, in panels by data set, from `as_released.moved`."""
    shown = {(code, quantity) for code, (_, _, quantity, measured) in CONTROLS.items() if measured == unit}
    table = moved[[key in shown for key in zip(moved["code"], moved["quantity"], strict=True)]]
    table = table.assign(name=table["code"] + ": " + table["property"], panel=table["judged_on"])
    return forest(table, f"What a property of the released code does: {unit}", "released minus sound")
