"""The paper's claims, each as a paired comparison with MoCo that the committed tables of results can answer.

Source: the claims are those of the abstract of Kaku, Upadhya and Razavian 2021 (2110.14805).
"""

from pathlib import Path

import pandas as pd

from mocolayers.recipe import PRETRAINED_ARMS
from study.report import by_seed, interval, primary, read_table, verdict

MATCHES = 0.01  # an AUC this much lower still counts as matching


EARLY = (1, 2)  # stages


def paired_by_seed(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """An arm's value minus MoCo's on the same data set and seed, averaged over data sets.

    Args:
        table: columns dataset, arm, seed and `value`; several rows of a cell are averaged.
    Returns:
        One row per seed, one column per arm; only seeds that an arm has on every data set.
    """
    wide = table.pivot_table(index=["seed", "dataset"], columns="arm", values=value)
    arms = [arm for arm in PRETRAINED_ARMS if arm in wide and arm != "moco"]
    if "moco" not in wide:
        return pd.DataFrame()
    differences = wide[arms].sub(wide["moco"], axis=0)
    return differences.groupby("seed").agg(lambda column: column.mean(skipna=False))


def claims(folder: Path) -> pd.DataFrame:
    """Every claim for every arm, from the tables in a folder.

    Returns:
        Columns claim, measured, arm, difference, low, high, seeds, verdict. Where the paper claims a lower number, the
        verdict says so. A table of analyses that is missing leaves its claims out.
    """
    found = []
    for claim, measured, seeds, better, sign in _comparisons(folder):
        for arm in seeds:
            values = seeds[arm].dropna()
            low, high = interval(values)
            about = {"claim": claim, "measured": measured, "arm": arm, "difference": values.mean()}
            about |= {"low": low, "high": high, "seeds": len(values)}
            ends = (low, high) if sign > 0 else (-high, -low)
            found.append(about | {"verdict": verdict(*ends, better)})
    return pd.DataFrame(found)


def _comparisons(folder: Path):
    """(claim, what is measured, differences by seed and arm, threshold, claimed sign) for each."""
    rows = by_seed(primary(read_table(folder / "low_label.csv")))  # so that every fraction and mode weighs the same
    few, many = rows["fraction"].min(), rows["fraction"].max()
    at = {fraction: rows[rows["fraction"] == fraction] for fraction in (few, many)}
    gain = {fraction: paired_by_seed(part, "auc") for fraction, part in at.items()}
    yield "1 improves MoCo", "AUC, all fractions and modes", paired_by_seed(rows, "auc"), 0.0, 1
    yield "2 beats or matches MoCo", f"the same, not {MATCHES} lower", paired_by_seed(rows, "auc"), -MATCHES, 1
    yield f"3 gains at {few:.0%} of the labels", f"AUC at {few:.0%}", gain[few], 0.0, 1
    yield (
        "3 gains are largest with few labels",
        f"gain at {few:.0%} - gain at {many:.0%}",
        gain[few] - gain[many],
        0.0,
        1,
    )
    reuse = read_table(folder / "similarity.csv")
    if len(reuse):
        reuse = primary(reuse[reuse["fraction"] == reuse["fraction"].min()])
        yield (
            "4 features are reused",
            "linear CKA before and after fine-tuning",
            paired_by_seed(reuse, "linear"),
            0.0,
            1,
        )
    probes = read_table(folder / "probing.csv")
    if len(probes):
        early = primary(probes[(probes["fraction"] == probes["fraction"].min()) & probes["stage"].isin(EARLY)])
        yield "5 informative earlier", "AUC of probes on stages 1 and 2", paired_by_seed(early, "auc"), 0.0, 1
    outputs = read_table(folder / "outputs.csv")
    if len(outputs):
        outputs = outputs[(outputs["class"] == "mean") & (outputs["fraction"] == outputs["fraction"].min())]
        yield "6 outputs nearer to many labels'", "KS distance", paired_by_seed(primary(outputs), "ks"), 0.0, -1
