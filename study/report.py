"""From rows of results to what is said of them: means, intervals, paired differences, verdicts, sentences."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mocolayers.runtime import atomic_write
from study import protocol

FEW_SAID = " and ".join(f"{fraction:.0%}" for fraction in protocol.FEW)
EQUAL = f"equal within {protocol.MARGIN:g}"
KEY = """
| column | meaning |
|---|---|
| `low`, `high` | a 95% interval over repetitions; in the gate the lowest and the highest seed |
| `difference` | in the gate, the mean of the seeds that did not choose the setting; `mean` is that of all seeds |
| `p`, `p_equal` | of no difference, and of one of 0.01 or more; both are corrected (Holm) for the rows of a family |
| `pull`, `gain` | the stage losses' share of the summed gradient norms on the encoder; AUC minus MoCo's |
| `size`, `seeds` of runs trained again | how far two runs of a recipe, and two repetitions of an arm, are apart |

A family is: the primary comparisons, the secondary ones, each claim; else the rows of one table.
"""


def table_in(file: Path) -> pd.DataFrame:
    """A table as it is in its file.

    Raises:
        ValueError: it is damaged, or no table of this study.
    """
    try:
        kinds = {"dataset": str, "judged_on": str, "arm": str, "stage": int, "fraction": float, "auc": float}
        table = pd.read_csv(file, dtype=kinds, keep_default_na=False, na_values="")  # a set may be called 007, or NA
        if file.stem == "scores":
            table[["stage", "fraction", "auc", "judged_on", "protocol", "source"]]
        table[["arm", "judged_on"] if file.stem == "as_released" else ["series", "dataset", "arm", "seed"]]
    except (ValueError, KeyError, pd.errors.ParserError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{file} is damaged, or no table of this study ({why}); move it away, and make it again: "
            f"python -m study run --out {file.parent}"
        ) from None
    return table


def read(name: str, dataset: str | None = None, folder: Path = protocol.TABLES) -> pd.DataFrame:
    """The table `folder/NAME.csv`, or its rows that are judged on one data set; empty if there is no such file.

    An arm with other stage weights than its own is called by both: "mse x5".
    """
    file = folder / f"{name}.csv"
    table = labelled(table_in(file)) if file.is_file() else pd.DataFrame()
    return table if dataset is None or table.empty else table[table["judged_on"] == dataset]


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """The table with other weights in the names of arms."""
    if "weight" not in table:
        return table
    named = table["arm"] + " x" + table["weight"].map("{:g}".format)
    return table.assign(arm=table["arm"].where(table["weight"] == 1, named))


def compared_in(name: str, dataset: str | None = None, folder: Path = protocol.TABLES) -> pd.DataFrame:
    """The rows of a table that the comparison has made in complete repetitions; of one data set, of their arms only."""
    whole, table = complete(usual(read("scores", folder=folder))), read(name, dataset, folder)
    table = table[(table["series"] == "comparison") & table["seed"].isin(whole["seed"])] if len(table) else table
    return table if dataset is None or table.empty else table[table["arm"].isin(protocol.EVERYWHERE)]


def usual(scores: pd.DataFrame, series: str = "comparison") -> pd.DataFrame:
    """The rows of a series that the main claim is about: fine-tuning, and linear evaluation of the last stage."""
    return scores[(scores["series"] == series) & (scores["stage"] == 4) & (scores["source"] == "encoder")]


def low_label(scores: pd.DataFrame, series: str) -> pd.DataFrame:
    """What choices are made by: the `usual` rows of a series with few labels, on test images of their own data set."""
    rows = usual(scores, series)
    return rows[rows["fraction"].isin(protocol.FEW) & (rows["judged_on"] == rows["dataset"])]


def setting_of(dataset: str, scores: pd.DataFrame) -> str:
    """MoCo's best candidate on a data set: mean AUC over both protocols and few labels, first seed of the gate.

    Raises:
        ValueError: the gate has not been run on the data set.
    """
    rows = low_label(scores, "gate").query("dataset == @dataset and arm == 'moco'")
    if rows.empty:
        raise ValueError(f"the gate has no rows of {dataset}; run first: python -m study run --series gate")
    return rows[rows["seed"] == rows["seed"].min()].groupby("setting", sort=False)["auc"].mean().idxmax()


def gate(scores: pd.DataFrame) -> pd.DataFrame:
    """MoCo minus no pretraining, per data set and protocol: mean over few labels, and whether it passes.

    Returns:
        Rows of dataset, protocol, setting, difference (of the seeds that did not choose the setting, if there are
        any), mean, low and high (lowest and highest) of all seeds, seeds, passes.
    """
    rows, found = low_label(scores, "gate"), []
    for dataset in rows.loc[rows["arm"] == "moco", "dataset"].unique():
        setting = setting_of(dataset, scores)
        own = rows[(rows["dataset"] == dataset) & ((rows["arm"] != "moco") | (rows["setting"] == setting))]
        for kind, base in zip(protocol.NAMES, protocol.UNTRAINED, strict=True):
            arms = own[own["protocol"] == kind].pivot_table(index="seed", columns="arm", values="auc")
            if {base, "moco"} <= set(arms):
                gain = (arms["moco"] - arms[base]).dropna()
                others = gain.iloc[1:] if len(gain) > 1 else gain  # the first seed chose the setting
                about = {"dataset": dataset, "protocol": kind, "setting": setting, "difference": others.mean()}
                about |= {"mean": gain.mean(), "low": gain.min(), "high": gain.max(), "seeds": len(gain)}
                found.append(about | {"passes": bool((gain.min() if kind == "linear" else gain.mean()) > 0)})
    return pd.DataFrame(found)


def worth(rows: pd.DataFrame) -> pd.DataFrame:
    """MoCo's AUC minus that of no pretraining, mean over few labels, per protocol and data set, as `compared`.

    Args:
        rows: of `usual`, of the comparison, whose repetitions have chosen nothing.
    """
    rows, gains = main_sets(rows[rows["fraction"].isin(protocol.FEW)]), []
    for kind, base in zip(protocol.NAMES, protocol.UNTRAINED, strict=True):
        differences = paired(rows[rows["protocol"] == kind], base)
        gains += [averaged(differences[["moco"]], ["fraction"])] if "moco" in differences else []
    return compared(pd.concat(gains), ratio=protocol.RATIO) if gains else pd.DataFrame()


def pulls(scores: pd.DataFrame) -> pd.DataFrame:
    """AUC minus MoCo's over the share of the gradient that the stage losses hold, in the series of weights.

    Returns:
        Rows of dataset, arm, weight, pull, gain: means over seeds, both protocols and few labels. Only of losses whose
        every weight has been tried with all seeds, wherever MoCo has been.
    """
    rows = main_sets(low_label(scores, "weights"))
    cell = ["dataset", "seed", "protocol", "fraction"]
    base = rows.loc[rows["arm"] == "moco", [*cell, "auc"]].rename(columns={"auc": "base"})
    rows = rows[~rows["arm"].isin(["moco", *protocol.UNTRAINED])].merge(base, on=cell)
    rows = rows.assign(gain=rows["auc"] - rows["base"], arm=rows["arm"].str.split(" x").str[0])
    lacking = base["seed"].nunique() < len(scale_of(rows).tuning[: protocol.SWEEPS])
    tried = {arm: len(part) / len(protocol.WEIGHTS.get(arm, [1])) for arm, part in rows.groupby("arm")}
    whole = [arm for arm, count in tried.items() if count >= len(base) and not lacking]
    rows = rows[rows["arm"].isin(whole)]
    return rows.groupby(["dataset", "arm", "weight"], as_index=False)[["pull", "gain"]].mean()


def best_weights(scores: pd.DataFrame) -> dict[str, float]:
    """The weight of each arm with the best mean gain over data sets; of the own arms only those ahead of MoCo."""
    gains = pulls(scores).groupby(["arm", "weight"])["gain"].mean()
    best = {arm: float(weight) for arm, weight in gains.groupby("arm").idxmax()}
    return {arm: weight for arm, weight in best.items() if arm not in protocol.OWN or gains[arm, weight] > 0}


def scale_of(scores: pd.DataFrame) -> protocol.Scale:
    """The scale that a table was made at."""
    return protocol.SCALES[scores["scale"].iloc[0] if "scale" in scores and len(scores) else "cpu"]


def main_sets(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the data sets of the protocol, or of all data sets if there are none of these."""
    inside = rows["judged_on"].isin(protocol.PRIMARY)
    return rows[inside] if inside.any() else rows


def primary(rows: pd.DataFrame, passed: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows of pretrained arms that averages are made of.

    Args:
        passed: of `gate`; a data set that did not pass for a protocol enters no average of it.
    """
    rows = main_sets(rows[~rows["arm"].isin(protocol.UNTRAINED)])
    if passed is None or passed.empty:
        return rows
    inside = passed.loc[passed["passes"], ["dataset", "protocol"]].rename(columns={"dataset": "judged_on"})
    return rows.merge(inside, on=["judged_on", "protocol"])


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of repetitions that are as whole as any: in the arms of `protocol.EVERYWHERE`, on the main data sets.

    Arms that join later, at their best weight or from a plug-in, have a number of seeds of their own.
    """
    rows_of = main_sets(rows[rows["arm"].isin(protocol.EVERYWHERE)])
    cells = rows_of[["seed", "judged_on", "arm", "protocol", "fraction"]].drop_duplicates()
    counts = cells.groupby("seed").size()
    return rows[rows["seed"].isin(counts.index[counts == counts.max()])]


def repetitions(scores: pd.DataFrame) -> int:
    """How many repetitions of the comparison are complete. Of fewer than two nothing is said: they have no interval."""
    return main_sets(complete(usual(scores)))["seed"].nunique()


def _cell(rows: pd.DataFrame) -> list[str]:
    return [name for name in protocol.CELL if name in rows]


def repeated(values: Sequence[float], ratio: float = 0.0) -> dict[str, float]:
    """The mean of repetitions with its 95% Student-t interval, and p values of no difference and of no equivalence.

    Args:
        values: one per repetition; below two only the mean is not NaN.
        ratio: test images per training image, if repetitions split the same images anew. They then share training
            images, and their mean varies more than that of independent ones.
    Source: corrected resampled t of Nadeau and Bengio 2003; two one-sided tests of Schuirmann 1987.
    """
    mean, freedom = np.mean(values), len(values) - 1
    error = np.std(values, ddof=1) * np.sqrt(1 / len(values) + ratio) if freedom else np.nan
    half = stats.t.ppf(1 - protocol.LEVEL / 2, freedom) * error
    away = np.array([abs(mean), protocol.MARGIN - abs(mean)]) / np.maximum(error, 1e-12)
    p, p_equal = stats.t.sf(away, freedom)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": 2 * p, "p_equal": p_equal, "seeds": len(values)}


def holm(p: Sequence[float]) -> np.ndarray:
    """p values corrected for their number: any false rejection has at most the level's chance (Holm 1979).

    What has no p value, NaN, is no comparison and does not count.
    """
    p = np.asarray(p, float)
    order, corrected, left = np.argsort(p), np.empty(len(p)), np.isfinite(p).sum() - np.arange(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * left))
    return corrected


def verdict(difference: float, p: float, p_equal: float) -> str:
    """Better, worse, equal within the margin, or undecided; a sure difference comes before a small one."""
    if p < protocol.LEVEL:
        return "better" if difference > 0 else "worse"
    return EQUAL if p_equal < protocol.LEVEL else "undecided"


def over_seeds(table: pd.DataFrame, value: str, ratio: float = 0.0) -> pd.DataFrame:
    """`repeated` for each cell and arm of a table with one row per seed; the mean is called `value`."""
    keys = [*_cell(table), "arm"]
    groups = table.groupby(keys, sort=False)[value]
    rows = [dict(zip(keys, key, strict=True)) | repeated(values, ratio) for key, values in groups]
    return pd.DataFrame(rows).rename(columns={"mean": value})


def summarise(rows: pd.DataFrame, value: str = "auc", ratio: float = 0.0) -> pd.DataFrame:
    """Mean and interval over seeds per cell and arm; with one seed, the mean of its patient-bootstrap intervals."""
    keys = [*_cell(rows), "arm"]
    means = rows.groupby([*keys, "seed"], sort=False, as_index=False)[[value, "low", "high"]].mean()
    alone = means.groupby(keys, sort=False)[["low", "high"]].mean().reset_index(drop=True)
    return over_seeds(means, value, ratio).fillna(alone).drop(columns=["p", "p_equal"], errors="ignore")


def paired(rows: pd.DataFrame, base: str = "moco", value: str = "auc") -> pd.DataFrame:
    """Each arm's value minus that of `base` in the same cell and seed, means over label subsets; a column per arm."""
    wide = rows.pivot_table(index=[*_cell(rows), "seed"], columns="arm", values=value)
    return wide.drop(columns=base).sub(wide[base], axis=0) if base in wide else wide[[]]


def averaged(differences: pd.DataFrame, over: Sequence[str] = ("judged_on",)) -> pd.DataFrame:
    """`paired` differences, averaged over data sets or other columns; only seeds that an arm has in all of them."""
    return differences.stack().unstack(list(over)).mean(axis=1, skipna=False).unstack("arm")


def compared(differences: pd.DataFrame, sign: int = 1, ratio: float = 0.0) -> pd.DataFrame:
    """The differences of each cell and arm over seeds, with both p values corrected for all rows, and a verdict.

    Args:
        differences: of `paired` or `averaged`.
        sign: -1 where lower is better.
        ratio: see `repeated`.
    """
    if differences.empty:
        return pd.DataFrame()
    table = over_seeds(differences.stack().dropna().rename("difference").reset_index(), "difference", ratio)
    table[["p", "p_equal"]] = table[["p", "p_equal"]].apply(holm)
    judged = zip(sign * table["difference"], table["p"], table["p_equal"], strict=True)
    return table.assign(verdict=[verdict(*row) for row in judged])


def main_claim(rows: pd.DataFrame, passed: pd.DataFrame | None = None) -> pd.DataFrame:
    """AUC minus MoCo's with few labels, mean over the primary data sets, per protocol, fraction and arm.

    Args:
        rows: of `usual`.
        passed: see `primary`.
    Returns:
        As `compared`, with `family`: "primary" for the arms of `protocol.LEADING`, else "secondary"; p values are
        corrected within each. No rows if no data set passed, or no arm is there to be compared.
    """
    kinds = primary(rows[rows["fraction"].isin(protocol.FEW)], passed).groupby("protocol", sort=False)
    # Each protocol for itself: it has its own data sets.
    differences = pd.concat([pd.DataFrame(), *(averaged(paired(part)) for _, part in kinds)])
    leading = [arm for arm in differences if arm.split(" x")[0] in protocol.LEADING]
    families = {"primary": differences[leading], "secondary": differences.drop(columns=leading)}
    return pd.concat(compared(part, ratio=protocol.RATIO).assign(family=name) for name, part in families.items())


def leading_gains(scores: pd.DataFrame, passed: pd.DataFrame) -> pd.DataFrame:
    """AUC of the leading arms minus MoCo's with the fewest labels, as `compared`; none without two repetitions."""
    rows = complete(usual(scores))
    rows = primary(rows[rows["fraction"] == protocol.FEW[0]], passed)
    rows = rows[rows["arm"].isin(["moco", *protocol.LEADING])]
    return compared(paired(rows), ratio=protocol.RATIO) if repetitions(scores) > 1 and len(rows) else pd.DataFrame()


def conditions(scores: pd.DataFrame, passed: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each arm's gain over MoCo under the released conditions minus its gain in the comparison, as `compared`."""
    released, tuned = (paired(primary(low_label(scores, series), passed)) for series in ("conditions", "comparison"))
    both = [arm for arm in released if arm in tuned]
    differences = (released[both] - tuned[both]).dropna(how="all") if both else pd.DataFrame()
    if differences.empty:
        return differences
    kinds = differences.groupby("protocol", sort=False)
    return compared(pd.concat(averaged(part) for _, part in kinds), ratio=protocol.RATIO)


def claims(folder: Path = protocol.TABLES) -> pd.DataFrame:
    """The claims of the paper's abstract as comparisons with MoCo; "better" is in the claimed direction."""
    parts = []
    for claim, measured, sign, differences in _claimed(folder):
        over = [name for name in differences.index.names if name != "seed"]
        found = compared(averaged(differences, over), sign, protocol.RATIO)
        parts.append(found.assign(claim=claim, measured=measured))
    return pd.concat([pd.DataFrame(), *parts], ignore_index=True)


def _claimed(folder: Path) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(claim, what is measured, claimed sign, paired differences) for each claim that has a table."""
    scores, rows = compared_in("scores", folder=folder), usual(compared_in("scores", folder=folder))
    passed = gate(read("scores", folder=folder))
    gains = paired(primary(rows, passed))
    if gains.empty:
        return
    few, many = rows["fraction"].min(), rows["fraction"].max()
    at = {fraction: gains.xs(fraction, level="fraction") for fraction in (few, many)}
    yield "1, 2 improves or matches MoCo", "AUC, all fractions and protocols", 1, gains
    yield f"3 gains at {few:.0%} of the labels", f"AUC at {few:.0%}", 1, at[few]
    yield "3 gains are largest with few labels", f"gain at {few:.0%} - gain at {many:.0%}", 1, at[few] - at[many]
    early = scores[scores["stage"].isin(protocol.EARLY)]
    reuse, outputs = (compared_in(name, folder=folder) for name in ("similarity", "outputs"))
    for claim, measured, sign, table, value in (
        ("4 features are reused", "linear CKA before and after", 1, reuse, "linear"),
        ("5 informative earlier", "AUC of stages 1 and 2", 1, early, "auc"),
        ("6 outputs are nearer", "KS distance", -1, outputs, "ks"),
    ):
        if len(table):
            # What has no protocol is about fine-tuned networks.
            table = table if "protocol" in table else table.assign(protocol="finetune")
            yield claim, measured, sign, paired(primary(table[table["fraction"] == few], passed), value=value)


def retest(twice: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """How far two runs of one recipe are apart, beside how far two seeds are; means over label subsets.

    Args:
        twice: rows with `auc` of one run and `again` of the other.
        scores: rows of several seeds; those of the main data sets count.
    Returns:
        Per protocol and fraction: runs; mean `difference` of a run's AUC; the root mean square of that difference
        between two runs (`size`) and between two seeds of one arm and data set (`seeds`).
    """
    keys = ["protocol", "fraction", "judged_on", "arm", "seed"]
    runs = twice[twice["judged_on"] == twice["dataset"]].groupby(keys)[["auc", "again"]].mean()
    moved = (runs["again"] - runs["auc"]).groupby(keys[:2])
    own = main_sets(scores[scores["judged_on"] == scores["dataset"]]).groupby(keys)["auc"].mean()
    variance = own.groupby(keys[:4]).var().groupby(keys[:2]).mean()
    size = moved.agg(lambda differences: np.sqrt(np.mean(differences**2)))
    table = {"runs": moved.size(), "difference": moved.mean(), "size": size, "seeds": np.sqrt(2 * variance)}
    return pd.DataFrame(table).reset_index()


def findings(scores: pd.DataFrame) -> str:
    """What a table of scores says, a sentence for each question, made from its numbers; and what has not been run."""
    done = set(scores["series"]) if len(scores) else set()
    passed = gate(scores) if "gate" in done else pd.DataFrame()
    tried = pulls(scores) if "weights" in done else pd.DataFrame(columns=["arm"])
    released = conditions(scores, passed) if "conditions" in done else pd.DataFrame()
    count, planned = repetitions(scores), len(scale_of(scores).repetitions)
    lines = [_figure_said(leading_gains(scores, passed)) if len(passed) else "The gate has not been run."]
    if count > 1:
        rows = complete(usual(scores))
        if len(found := worth(rows)):
            lines.append(_worth_said(found))
        lines.append(_comparison_said(main_claim(rows, passed), count, planned))
    else:
        lines.append("The comparison of the arms has fewer than two repetitions; a result needs two.")
    paper = tried[~tried["arm"].isin(protocol.OWN)]
    lines.append(_others_said(paper, released, planned) if len(paper) else "No weight of a loss has been tried yet.")
    lacking = [f"*{name}* ({asked})" for name, asked in protocol.SERIES.items() if name not in done]
    lacking += [f"the weights of `{arm}`" for arm in protocol.WEIGHTS if arm not in set(tried["arm"])]
    if lacking:
        lines.append(f"Not run yet, or not whole: {', '.join(lacking)}.")
    return "\n\n".join(lines)


def _figure_said(shown: pd.DataFrame) -> str:
    """Which data sets the figure and the averages are of."""
    if shown.empty:
        return "The figure has MoCo minus no pretraining on every data set."
    sets = shown.groupby("protocol")["judged_on"].unique().map(", ".join)
    said = "; ".join(f"{name.lower()}: {sets.get(kind, 'none')}" for kind, name in protocol.NAMES.items())
    return f"The figure has the data sets on which MoCo beat no pretraining in a first test ({said})."


def _worth_said(found: pd.DataFrame) -> str:
    """Where MoCo helps on patients that have chosen nothing."""
    parts = [f"**Does MoCo help?** Compared with no pretraining, with {FEW_SAID} of the labels, on other patients."]
    for kind, part in found.groupby("protocol", sort=False):
        sets = part.groupby("verdict")["judged_on"].agg(", ".join)
        parts.append(f"{protocol.NAMES[kind]}: {'; '.join(f'{said} on {names}' for said, names in sets.items())}.")
    return " ".join(parts)


def _comparison_said(claim: pd.DataFrame, count: int, planned: int) -> str:
    """The verdicts of the primary family."""
    found = claim[claim["family"] == "primary"] if len(claim) else claim
    if found.empty:
        return "No data set passed the gate with the losses of the main question, so no average can be made."
    few, losses, ways = protocol.FEW[0], found["arm"].nunique(), found["protocol"].nunique()
    head = "**Do losses on intermediate layers help more?** On the average of the data sets in the figure, they change"
    at_few = found[found["fraction"] == few]
    below = f"{(at_few['high'] < protocol.CLAIM).sum()} of the {len(at_few)} intervals at {few:.0%} are below it"
    claimed = f"The paper reports about {protocol.CLAIM:.0%} with {few:.0%} of the labels. If that is +{protocol.CLAIM}"
    kinds = f"{losses} losses, {ways} ways to judge, {FEW_SAID} of the labels; {count} of {planned} repetitions"
    return (
        f"{head} MoCo's AUC by {_range(found['difference'])}. {claimed} AUC, {below}. "
        f"Of {len(found)} comparisons ({kinds}): {_counted(found)}."
    )


def _others_said(tried: pd.DataFrame, found: pd.DataFrame, planned: int) -> str:
    """Whether another weight or another recipe changes the answer."""
    means = tried.groupby(["arm", "weight"])[["pull", "gain"]].mean().groupby("arm")
    best, last = means["gain"].max(), means.last()  # of each loss: at its best weight, and at its largest
    said = (
        "**Would another weight or the paper's recipe help?** With the best of the weights that were tried, the losses "
        f"change MoCo's AUC by {_range(best)} (the choice flatters them). With the largest, where they have "
        f"{last['pull'].min():.0%} to {last['pull'].max():.0%} of the gradient, they change it by "
        f"{_range(last['gain'])}. (Means over {tried['dataset'].nunique()} data sets and {protocol.SWEEPS} seeds.)"
    )
    if len(found):
        counts = f"{_counted(found)}; {found['seeds'].max()} of {planned} repetitions"
        said += f" The paper's released settings change the gain over MoCo by {_range(found['difference'])} ({counts})."
    return said


def signed(value: float) -> str:
    """A difference with its sign and three digits; what rounds to nothing has no sign."""
    return "0.000" if abs(value) < 0.0005 else f"{value:+.3f}"


def _range(values: pd.Series) -> str:
    return f"{signed(values.min())} to {signed(values.max())}"


def _counted(found: pd.DataFrame) -> str:
    return ", ".join(f"{number} {word}" for word, number in found["verdict"].value_counts().items())


def page(folder: Path = protocol.TABLES) -> str:
    """All that the tables of a folder say, as a page of tables."""
    scores, again, elsewhere = (read(name, folder=folder) for name in ("scores", "again", "again_elsewhere"))
    passed, rows = gate(scores), complete(usual(scores))
    few = rows[rows["fraction"].isin(protocol.FEW)]
    told = {
        "The gate: MoCo minus no pretraining, few labels": passed,
        "The weights: AUC minus MoCo's over the share of the gradient": pulls(scores),
        "MoCo minus no pretraining in the comparison, few labels, on other patients": worth(rows),
        "The main claim: AUC minus MoCo's, mean over the data sets that passed": main_claim(rows, passed),
        "The same over all main data sets, whatever the gate says": main_claim(rows),
        "The same for each data set": compared(paired(primary(few, passed)), ratio=protocol.RATIO),
        "Claim by claim": claims(folder),
        "The gain under the released conditions minus the gain here": conditions(scores, passed),
        "Runs trained again from nothing": retest(usual(again), rows) if len(again) else again,
        "The same on another kind of processor": retest(usual(elsewhere), rows) if len(elsewhere) else elsewhere,
        "Mean AUC over repetitions": summarise(main_sets(rows), ratio=protocol.RATIO),
    }
    if len(apart := few[~few["judged_on"].isin(protocol.PRIMARY)]):
        told |= {
            "The second rank, mean over its data sets that passed": main_claim(apart, passed),
            "The second rank, for each data set": compared(paired(apart), ratio=protocol.RATIO),
        }
    head = "# The study in tables\n\nWritten by `python -m study report`. [PROTOCOL.md](PROTOCOL.md) has the rules. "
    head += f"[Notebook 08](../notebooks/08_results_and_scaling_up.ipynb) tells it with figures.\n{KEY}"
    form = {"index": False, "border": 0, "float_format": "{:.3f}".format, "na_rep": ""}
    parts = [f"## {title}\n\n{table.to_html(**form)}\n" for title, table in told.items() if len(table)]
    return "\n".join([head, *parts])


def write_readme(readme: Path = protocol.README, folder: Path = protocol.TABLES) -> None:
    """Put the findings of a folder's tables, and their figure, between the README's two markers.

    Raises:
        ValueError: the README lacks the markers.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(protocol.BEGIN)
    _, end, after = rest.partition(protocol.END)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the lines {protocol.BEGIN!r} and {protocol.END!r} around the results")
    text = "Differences of AUC with few labels, a row per data set, with intervals"
    said = f"![{text}](study/tables/{protocol.FIGURE})\n\n{findings(read('scores', folder=folder))}"
    atomic_write(readme, lambda path: path.write_text(f"{before}{begin}\n\n{said}\n\n{end}{after}", encoding="utf-8"))
