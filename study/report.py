"""From the raw rows of the results to what is said of them: means, intervals, paired differences, the README."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mocolayers.notebook.figures import PROTOCOLS as MODE_NAMES
from mocolayers.notebook.figures import forest
from mocolayers.recipe import ARMS, OWN_ARMS, PRETRAINED_ARMS
from mocolayers.runtime import atomic_write

BEGIN, END = "<!-- results: written by `make results` -->", "<!-- end of results -->"


CELL = ["dataset", "mode", "fraction"]


NEAR_CHANCE = 0.6


PRIMARY = ("nih_finding", "breast_histology", "retina")  # one per modality of the paper, see study/PROTOCOL.md


# The protocol's later series: what they change, and their folder beside the first one's table.
LATER = {"longer training": "long", "longer training, 64 px": "larger"}


CLAIM = 0.05  # the gain at 1% of the labels that the paper reports on the average of its data sets


VERDICTS = ("supported", "opposite", "not supported here", "cannot tell")


def by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """One AUC per data set, mode, fraction, arm and seed: the mean over that seed's label subsets."""
    return rows.groupby([*CELL, "arm", "seed"], as_index=False)["auc"].mean()


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% Student-t interval of the mean over seeds; NaN below two seeds."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC and interval per data set, mode, fraction and arm.

    With several seeds the interval is over seeds, each with its own initial weights and label subsets. With one seed
    it is the mean of that seed's patient-bootstrap intervals, which know nothing of either.
    """
    found = []
    for key, group in by_seed(rows).groupby([*CELL, "arm"]):
        low, high = interval(group["auc"])
        if len(group) < 2:
            same = rows[(rows[[*CELL, "arm"]] == list(key)).all(axis=1)]
            low, high = same["low"].mean(), same["high"].mean()
        about = dict(zip([*CELL, "arm"], key, strict=True))
        found.append(about | {"auc": group["auc"].mean(), "low": low, "high": high, "seeds": len(group)})
    table = pd.DataFrame(found)
    return table.sort_values([*CELL, "arm"], key=lambda c: c.map((*ARMS, "pixels").index) if c.name == "arm" else c)


def by_stage(probes: pd.DataFrame) -> pd.DataFrame:
    """`summarise` for the rows of `analysis.probe_stages`, with the columns that `plots.stage_curves` takes."""
    table = summarise(probes.assign(mode=probes["stage"])).rename(columns={"mode": "stage", "auc": "value"})
    table["panel"] = [f"{fraction:.0%} of the labels" for fraction in table["fraction"]]
    return table.sort_values(["fraction", "stage"], kind="stable")


def read_table(csv: Path, dataset: str | None = None) -> pd.DataFrame:
    """The rows of a committed table, all or those of one data set; no rows if there is no such file."""
    if not csv.is_file():
        return pd.DataFrame()
    table = pd.read_csv(csv)
    return table if dataset is None else table[table["dataset"] == dataset]


def paired_differences(rows: pd.DataFrame, base: str = "moco") -> pd.DataFrame:
    """AUC of each arm minus that of `base` on the same seeds and label subsets: mean, interval over seeds, wins."""
    wide = by_seed(rows).pivot_table(index=[*CELL, "seed"], columns="arm", values="auc")
    found = []
    for key, group in wide.groupby(CELL):
        for arm in group.columns.drop(base, errors="ignore"):
            gain = (group[arm] - group[base]).dropna().to_numpy() if base in group else np.array([])
            if not len(gain):
                continue
            low, high = interval(gain)
            about = dict(zip(CELL, key, strict=True)) | {
                "arm": arm,
                "difference": gain.mean(),
                "low": low,
                "high": high,
            }
            found.append(about | {"wins": int((gain > 0).sum()), "seeds": len(gain)})
    return pd.DataFrame(found)


def across_datasets(rows: pd.DataFrame) -> pd.DataFrame:
    """Paired differences averaged over data sets first, then over seeds: one row per mode, fraction and arm.

    Only seeds that an arm has on every data set count, so that no data set weighs more than another.
    """
    wide = by_seed(rows).pivot_table(index=["mode", "fraction", "arm", "seed"], columns="dataset", values="auc")
    mean = wide.dropna().mean(axis=1).rename("auc").reset_index()
    return paired_differences(mean.assign(dataset="all"))


def primary(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that the main claim is judged on: one data set of each modality; all rows where none of them stands."""
    chosen = rows[rows["dataset"].isin(PRIMARY)]
    return chosen if len(chosen) else rows


def verdict(low: float, high: float, better: float = 0.0, claimed: float = -np.inf) -> str:
    """What an interval of differences says, one of `VERDICTS`: whether it lies above `better`, below it, or on both
    sides, and then whether it at least rules out a claimed difference."""
    if low > better:
        return "supported"
    if high < better:
        return "opposite"
    return "not supported here" if high < claimed else "cannot tell"


def claim_by_arm(rows: pd.DataFrame) -> pd.DataFrame:
    """The primary comparison of every arm and mode: the row of `across_datasets` at the smallest fraction, judged."""
    table = across_datasets(primary(rows))
    table = table[(table["fraction"] == table["fraction"].min()) & table["arm"].isin(PRETRAINED_ARMS)]
    verdicts = [verdict(row.low, row.high, claimed=CLAIM) for row in table.itertuples()]
    return table.drop(columns="dataset").assign(verdict=verdicts).reset_index(drop=True)


def claim_as_a_whole(table: pd.DataFrame) -> str:
    """What the rows of `claim_by_arm` say together of the paper's arms; the rule is the protocol's."""
    table = table[~table["arm"].isin(OWN_ARMS)]
    supported = table[table["verdict"] == "supported"].groupby("arm")["mode"].nunique()
    if (supported >= len(MODE_NAMES)).any():
        return "replicated"
    if len(supported):
        return "mixed"
    undecided = (table["verdict"] == "cannot tell").any()
    return "undecided" if undecided else "not replicated at this scale"


def auc_table(rows: pd.DataFrame, mode: str) -> str:
    """A Markdown table: one line per arm, one column per data set and label fraction, mean and half of the interval."""
    part = summarise(rows[rows["mode"] == mode])
    datasets, fractions = sorted(part["dataset"].unique()), sorted(part["fraction"].unique())
    head = [f"{name} {fraction:.0%}" for name in datasets for fraction in fractions]
    lines = ["| arm | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    best = part.groupby(["dataset", "fraction"])["auc"].max()
    for arm in [arm for arm in ARMS if arm in set(part["arm"])]:
        texts = []
        for name, fraction in itertools.product(datasets, fractions):
            row = part[(part["dataset"] == name) & (part["fraction"] == fraction) & (part["arm"] == arm)]
            texts.append(_auc_text(row, best[name, fraction]))
        lines.append(f"| {arm} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _auc_text(row: pd.DataFrame, best: float) -> str:
    if row.empty:
        return "-"
    mean, half = row["auc"].iloc[0], (row["high"] - row["low"]).iloc[0] / 2
    text = f"{mean:.3f}"
    return (f"**{text}**" if mean == best else text) + f" ± {half:.3f}"


def read_later(folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of each series of `LATER` that stands in a folder of results."""
    tables = {name: read_table(folder / place / "low_label.csv") for name, place in LATER.items()}
    return {name: table for name, table in tables.items() if len(table)}


def difference_figure(rows: pd.DataFrame, later: dict[str, pd.DataFrame]):
    """Forest plot of every stage-loss arm against MoCo at the smallest label fraction.

    One line per data set of `rows`, one for their primary mean, and one for that of each of the `later` series.
    """
    table = paired_differences(rows)
    smallest = table["fraction"].min()
    table = table[(table["fraction"] == smallest) & table["arm"].isin(PRETRAINED_ARMS)]
    parts = [table.assign(name=table["dataset"]), claim_by_arm(rows).assign(name="mean of the modalities")]
    parts += [claim_by_arm(table).assign(name=f"the same, {name}") for name, table in later.items()]
    table = pd.concat(parts)
    table = table.assign(panel=table["mode"].map(MODE_NAMES)).sort_values("panel", ascending=False, kind="stable")
    return forest(table, f"Do intermediate layers help at {smallest:.0%} of the labels?", "AUC minus MoCo's", CLAIM)


def findings(rows: pd.DataFrame, later: dict[str, pd.DataFrame]) -> str:
    """What the numbers say, in sentences made from them; `later` as from `read_later`."""
    every, seeds = claim_by_arm(rows), rows["seed"].nunique()
    smallest, judged = every["fraction"].min(), sorted(primary(rows)["dataset"].unique())
    lines = [f"- The paper's main claim, by the rule of the protocol: **{claim_as_a_whole(every)}**."]
    for mode, name in MODE_NAMES.items():
        title = f"{name.capitalize()} at {smallest:.0%} of the labels, AUC minus MoCo's, mean over {', '.join(judged)}"
        lines.append(f"- {title}: {_gains(every, mode)}.")
    for series, table in later.items():
        after, seeds_there = claim_by_arm(table), table["seed"].nunique()
        said = [f"{name}: {_gains(after, mode)}" for mode, name in MODE_NAMES.items()]
        best = ", ".join(f"{name} {auc:.3f}" for name, auc in _best(table).items())
        lines.append(f"- The same with {series} ({seeds_there} seeds; best AUC {best}), {'. '.join(said)}.")
    for mode, base, name in (
        ("linear", "random", "the untrained encoder"),
        ("finetune", "supervised", "no pretraining"),
    ):
        lift = paired_differences(rows[rows["mode"] == mode], base)
        lift = lift[(lift["fraction"] == smallest) & (lift["arm"] == "moco")] if len(lift) else lift
        said = [
            f"{row.dataset} {row.difference:+.3f} ({row.wins} of {row.seeds} seeds up)" for row in lift.itertuples()
        ]
        lines.append(
            f"- MoCo over {name}, {MODE_NAMES[mode]}, {smallest:.0%}: {'; '.join(said) or 'not in the table'}."
        )
    best = _best(rows)
    weak = [name for name, value in best.items() if value < NEAR_CHANCE]
    said = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
    note = (
        f"; near chance in every arm, and so able to tell arms apart at most weakly: {', '.join(weak)}" if weak else ""
    )
    lines.append(f"- Best mean AUC of any arm with all labels: {said}{note}.")
    lines.append(f"- Intervals are 95% Student-t intervals over {seeds} seeds; few seeds make them wide, and honest.")
    return "\n".join(lines)


def _best(rows: pd.DataFrame) -> pd.Series:
    """Per data set the best mean AUC of any arm and mode with all labels."""
    most = rows[rows["fraction"] == rows["fraction"].max()]
    return most.groupby(["dataset", "arm", "mode"])["auc"].mean().groupby("dataset").max()


def _gains(table: pd.DataFrame, mode: str) -> str:
    """The rows of `claim_by_arm` for one mode in words, the largest gain first."""
    part = table[table["mode"] == mode].sort_values("difference", ascending=False)
    said = [
        f"{row.arm} {row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f}, {row.verdict})"
        for row in part.itertuples()
    ]
    return "; ".join(said)


def results_section(rows: pd.DataFrame, later: dict[str, pd.DataFrame]) -> str:
    """The README's results: findings, the figure and both tables."""
    return "\n\n".join(
        [
            findings(rows, later),
            "![Paired AUC differences to MoCo at the smallest label fraction, one panel for linear evaluation and one "
            "for fine-tuning, one line per data set and for their mean, whiskers are 95% intervals]"
            "(results/low_label.png)",
            "Linear evaluation, test AUC (mean ± half the 95% interval over seeds; best mean in bold):",
            auc_table(rows, "linear"),
            "Fine-tuning, test AUC:",
            auc_table(rows, "finetune"),
        ]
    )


def write_readme(csv: Path, readme: Path) -> None:
    """Draw the figure beside the CSV, and put the results between the README's two markers.

    Raises:
        ValueError: the README lacks the markers.
    """
    rows, later = pd.read_csv(csv), read_later(csv.parent)
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} lacks the lines {BEGIN!r} and {END!r}; put them where the results belong")
    figure = difference_figure(rows, later)
    atomic_write(csv.with_suffix(".png"), lambda path: figure.savefig(path, format="png", dpi=110))
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{results_section(rows, later)}\n\n{END}{after}"
    atomic_write(readme, lambda path: path.write_text(new, encoding="utf-8"))
