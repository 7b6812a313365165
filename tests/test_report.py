"""Claims about what is said of the results."""

import pandas as pd
import pytest

from mocolayers.notebook.series import HOME
from study import report

CSV = HOME / "study" / "tables" / "low_label.csv"


def rows(gains):
    """Two arms on two data sets; `mse` beats `moco` by gains[dataset][seed]."""
    found = []
    for dataset, by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            for arm, auc in (("random", 0.6), ("moco", 0.7), ("mse", 0.7 + gain)):
                for mode in ("linear", "finetune"):
                    about = {"dataset": dataset, "arm": arm, "fraction": 0.01, "seed": seed, "subset": 0, "mode": mode}
                    found.append(about | {"labels": 10, "auc": auc, "low": auc - 0.1, "high": auc + 0.1})
    return pd.DataFrame(found)


def test_differences_are_paired_by_seed():
    table = report.paired_differences(rows({"a": [0.01, 0.02, 0.03]}))
    mse = table[(table["arm"] == "mse") & (table["mode"] == "linear")].iloc[0]
    assert mse["difference"] == pytest.approx(0.02)
    assert (mse["wins"], mse["seeds"]) == (3, 3)
    # Student-t with two degrees of freedom: 4.303 * 0.01 / sqrt(3)
    assert mse["high"] - mse["difference"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)


def test_every_data_set_weighs_the_same_in_the_mean():
    table = report.across_datasets(rows({"a": [0.0, 0.0], "b": [0.1, 0.1]}))
    assert table.query("arm == 'mse' and mode == 'linear'")["difference"].item() == pytest.approx(0.05)


def test_a_seed_missing_on_one_data_set_does_not_count():
    table = report.across_datasets(rows({"a": [0.0, 0.5], "b": [0.1]}))
    assert table.query("arm == 'mse' and mode == 'linear'")["difference"].item() == pytest.approx(0.05)


def test_one_seed_shows_the_patient_interval_instead_of_none():
    summary = report.summarise(rows({"a": [0.01]}))
    assert (summary["high"] - summary["low"]).to_numpy() == pytest.approx(0.2)


def test_the_readme_says_what_the_table_says():
    text = (HOME / "README.md").read_text(encoding="utf-8")
    assert report.results_section(pd.read_csv(CSV), report.read_later(CSV.parent)) in text, (
        "run: python -m mocolayers results --only-write"
    )


def test_every_arm_was_judged_on_the_same_label_subsets():
    table = pd.read_csv(CSV)
    counts = table.groupby(["dataset", "mode", "fraction", "seed", "subset"])["labels"].nunique()
    assert (counts == 1).all()


def _seeds(table: pd.DataFrame) -> pd.Series:
    return table.groupby(["dataset", "arm", "mode", "fraction"])["seed"].nunique()


def test_the_committed_table_holds_the_whole_grid():
    table = pd.read_csv(CSV)
    grid = _seeds(table)
    trained = 4 * (7 + 7) * 3  # four data sets, seven arms in either mode, three fractions
    outside = 7 * 3  # one more data set, seven arms by linear evaluation, three fractions
    assert len(grid) == trained + outside
    assert (grid >= 5).all()
    later = {name: _seeds(table) for name, table in report.read_later(CSV.parent).items()}
    grid = later["longer training"]
    assert len(grid) == 4 * (3 + 3) * 3 + 3 * 3 and (grid >= 5).all(), "three arms, as in the protocol"
    grid = later["longer training, 64 px"]
    assert len(grid) == 3 * (5 + 5) * 3 + 5 * 3 and grid.nunique() == 1, "complete seeds of every arm"
    assert table[["auc", "low", "high", "seconds"]].notna().all().all()
    assert ((table["low"] <= table["auc"]) & (table["auc"] <= table["high"])).mean() > 0.99
