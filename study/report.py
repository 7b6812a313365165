"""From rows of results to what is said of them: means, intervals, paired differences, verdicts, sentences."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mocolayers.runtime import atomic_write
from study import protocol

EQUAL = f"equal within {protocol.MARGIN:g}"


def read(name: str, dataset: str | None = None, folder: Path = protocol.FIRST) -> pd.DataFrame:
    """The table `folder/NAME.csv`, or its rows that are judged on one data set; empty if there is no such file."""
    file = folder / f"{name}.csv"
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame()
    return table if dataset is None or table.empty else table[table["judged_on"] == dataset]


def usual(scores: pd.DataFrame, series: str = "first") -> pd.DataFrame:
    """The rows of a series that the main claim is about: fine-tuning, and linear evaluation of the last stage."""
    return scores[(scores["series"] == series) & (scores["stage"] == 4) & (scores["source"] == "encoder")]


def primary(rows: pd.DataFrame) -> pd.DataFrame:
    """The pretrained arms on one data set of each modality; on all data sets if there are none of these."""
    rows = rows[~rows["arm"].isin(protocol.UNTRAINED)]
    inside = rows["judged_on"].isin(protocol.PRIMARY)
    return rows[inside] if inside.any() else rows


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
    """p values corrected for their number: any false rejection has at most the level's chance (Holm 1979)."""
    p = np.asarray(p, float)
    order, corrected = np.argsort(p), np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
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


def summarise(rows: pd.DataFrame, value: str = "auc") -> pd.DataFrame:
    """Mean and interval over seeds per cell and arm; with one seed, the mean of its patient-bootstrap intervals."""
    keys = [*_cell(rows), "arm"]
    means = rows.groupby([*keys, "seed"], sort=False, as_index=False)[[value, "low", "high"]].mean()
    alone = means.groupby(keys, sort=False)[["low", "high"]].mean().reset_index(drop=True)
    return over_seeds(means, value).fillna(alone).drop(columns=["p", "p_equal"])


def paired(rows: pd.DataFrame, base: str = "moco", value: str = "auc") -> pd.DataFrame:
    """Each arm's value minus that of `base` in the same cell and seed, means over label subsets; a column per arm."""
    wide = rows.pivot_table(index=[*_cell(rows), "seed"], columns="arm", values=value)
    return wide.drop(columns=base).sub(wide[base], axis=0) if base in wide else pd.DataFrame()


def averaged(differences: pd.DataFrame, over: Sequence[str] = ("judged_on",)) -> pd.DataFrame:
    """`paired` differences, averaged over data sets or other columns; only seeds that an arm has in all of them."""
    return differences.stack().unstack(list(over)).mean(axis=1, skipna=False).unstack("arm")


def compared(differences: pd.DataFrame, sign: int = 1, ratio: float = 0.0) -> pd.DataFrame:
    """The differences of each cell and arm over seeds, with p corrected for all rows, and a verdict.

    Args:
        differences: of `paired` or `averaged`.
        sign: -1 where lower is better.
        ratio: see `repeated`.
    """
    table = over_seeds(differences.stack().dropna().rename("difference").reset_index(), "difference", ratio)
    table["p"] = holm(table["p"])
    judged = zip(sign * table["difference"], table["p"], table["p_equal"], strict=True)
    return table.assign(verdict=[verdict(*row) for row in judged])


def main_claim(rows: pd.DataFrame) -> pd.DataFrame:
    """AUC minus MoCo's at the smallest label fraction, mean over the primary data sets, per protocol and arm."""
    return compared(averaged(paired(primary(rows[rows["fraction"] == rows["fraction"].min()]))))


def claims(folder: Path = protocol.TABLES) -> pd.DataFrame:
    """The claims of the paper's abstract as comparisons with MoCo; "better" is in the claimed direction."""
    parts = []
    for claim, measured, sign, differences in _claimed(folder):
        over = [name for name in differences.index.names if name != "seed"]
        parts.append(compared(averaged(differences, over), sign).assign(claim=claim, measured=measured))
    return pd.concat(parts, ignore_index=True)


def _claimed(folder: Path) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(claim, what is measured, claimed sign, paired differences) for each claim that has a table."""
    scores = read("scores", folder=folder)
    gains = paired(primary(usual(scores)))
    few, many = scores["fraction"].min(), scores["fraction"].max()
    at = {fraction: gains.xs(fraction, level="fraction") for fraction in (few, many)}
    yield "1, 2 improves or matches MoCo", "AUC, all fractions and protocols", 1, gains
    yield f"3 gains at {few:.0%} of the labels", f"AUC at {few:.0%}", 1, at[few]
    yield "3 gains are largest with few labels", f"gain at {few:.0%} - gain at {many:.0%}", 1, at[few] - at[many]
    early = scores[(scores["series"] == "first") & scores["stage"].isin(protocol.EARLY)]
    reuse, outputs = read("similarity", folder=folder), read("outputs", folder=folder)
    outputs = outputs[outputs["class"] == "mean"] if len(outputs) else outputs
    for claim, measured, sign, table, value in (
        ("4 features are reused", "linear CKA before and after", 1, reuse, "linear"),
        ("5 informative earlier", "AUC of stages 1 and 2", 1, early, "auc"),
        ("6 outputs nearer to many labels'", "KS distance", -1, outputs, "ks"),
    ):
        if len(table):
            yield claim, measured, sign, paired(primary(table[table["fraction"] == few]), value=value)


def retest(twice: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """How far two runs of one recipe are apart, beside how far two seeds are; means over label subsets.

    Args:
        twice: rows with `auc` of one run and `again` of the other.
        scores: rows of several seeds.
    Returns:
        Per protocol and fraction: runs; mean `difference` of a run's AUC; the root mean square of that difference
        between two runs (`size`) and between two seeds of one arm and data set (`seeds`).
    """
    keys = ["protocol", "fraction", "judged_on", "arm", "seed"]
    runs = twice.groupby(keys)[["auc", "again"]].mean()
    moved = (runs["again"] - runs["auc"]).groupby(keys[:2])
    variance = scores.groupby(keys)["auc"].mean().groupby(keys[:4]).var().groupby(keys[:2]).mean()
    size = moved.agg(lambda differences: np.sqrt(np.mean(differences**2)))
    table = {"runs": moved.size(), "difference": moved.mean(), "size": size, "seeds": np.sqrt(2 * variance)}
    return pd.DataFrame(table).reset_index()


def findings(scores: pd.DataFrame) -> str:
    """What a table of scores says, in sentences made from its numbers."""
    rows = usual(scores)
    few, judged = rows["fraction"].min(), ", ".join(sorted(primary(rows)["judged_on"].unique()))
    lines = [f"AUC minus MoCo's with {few:.0%} of the labels, mean over {judged}:\n"]
    lines += [_of_series(usual(scores, name), name) for name in protocol.SERIES if name in set(scores["series"])]
    lines.append("\nWhat these can tell:\n")
    for name, base in zip(protocol.NAMES, protocol.UNTRAINED, strict=True):
        part = rows[(rows["protocol"] == name) & (rows["fraction"] == few) & rows["arm"].isin([base, "moco"])]
        if part["arm"].nunique() == 2:
            lines.append(
                f"- {protocol.NAMES[name]}, MoCo minus `{base}`: {_said(compared(paired(part, base)), 'judged_on')}."
            )
    most = rows[rows["fraction"] == rows["fraction"].max()]
    best = most.groupby(["judged_on", "arm", "protocol"])["auc"].mean().groupby("judged_on").max()
    weak = ", ".join(best.index[best < protocol.NEAR_CHANCE]) or "none"
    said = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
    lines.append(f"- Best mean AUC of any arm with all labels: {said}. Near chance in every arm: {weak}.")
    level = f"at the {protocol.LEVEL:.0%} level, corrected for the comparisons of a series (Holm)"
    lines.append(f"- Intervals are 95% Student-t intervals over seeds; few seeds make them wide. Verdicts are {level}.")
    return "\n".join(lines)


def _of_series(rows: pd.DataFrame, name: str) -> str:
    """The comparisons of one series in words."""
    found, title = main_claim(rows), protocol.SERIES[name].title
    counts = ", ".join(f"{count} {word}" for word, count in found["verdict"].value_counts().items())
    holds = ((found["low"] <= protocol.CLAIM) & (found["high"] >= protocol.CLAIM)).sum()
    line = f"- **{title.capitalize()}** ({rows['seed'].nunique()} seeds): of {len(found)} comparisons {counts}; "
    line += f"{holds} of the intervals hold the paper's gain of about {protocol.CLAIM:+.2f}."
    kinds = found.groupby("protocol", sort=False)
    return line + "".join(f" {protocol.NAMES[kind]}: {_said(part, 'arm')}." for kind, part in kinds)


def _said(found: pd.DataFrame, name: str) -> str:
    """The rows of `compared` in words, each by its value in a column, the largest first."""
    rows = found.sort_values("difference", ascending=False).to_dict("records")
    return ", ".join(f"{row[name]} {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" for row in rows)


def write_readme(readme: Path = protocol.README, folder: Path = protocol.TABLES) -> None:
    """Put the findings of a folder's tables, and their figure, between the README's two markers.

    Raises:
        ValueError: the README lacks the markers.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(protocol.BEGIN)
    _, end, after = rest.partition(protocol.END)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the lines {protocol.BEGIN!r} and {protocol.END!r} around the results")
    text = "AUC minus MoCo's with few labels: a line per data set and loss, whiskers are 95% intervals over seeds"
    said = f"![{text}](study/tables/{protocol.FIGURE})\n\n{findings(read('scores', folder=folder))}"
    atomic_write(readme, lambda path: path.write_text(f"{before}{begin}\n\n{said}\n\n{end}{after}", encoding="utf-8"))
