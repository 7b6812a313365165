"""Claims about running a part of the results again."""

import pandas as pd
import pytest

from mocolayers.__main__ import main
from mocolayers.notebook.series import HOME
from study import again, report
from study.run import grid

GRID = grid(["a", "b"], ["moco", "mse"], [0, 1, 2])


def committed() -> pd.DataFrame:
    """Two label subsets a run; a later seed is .1 better than the one before it."""
    cells = [(cell.dataset, cell.arm, cell.seed, subset) for cell in GRID for subset in (0, 1)]
    rows = [dict(zip(("dataset", "arm", "seed", "subset"), cell, strict=True)) for cell in cells]
    table = pd.DataFrame(rows).assign(mode="linear", fraction=0.01)
    return table.assign(auc=0.6 + 0.1 * table["seed"])


def test_a_draw_is_a_part_of_the_grid_and_the_same_every_time():
    drawn = again.draw(GRID, 5)
    assert len(set(map(str, drawn))) == 5 and drawn == again.draw(GRID, 5)
    assert drawn != again.draw(GRID, 5, seed=1)
    assert [cell for cell in GRID if cell in drawn] == drawn, "in the order of the grid"


def test_every_row_of_a_drawn_run_stands_beside_the_committed_one(monkeypatch):
    table = committed()
    new = table[table["seed"] == 1].assign(auc=0.72, f1=0.0)
    monkeypatch.setattr(again, "sweep", lambda cells, jobs, analyses: {"low_label": new})
    found = again.run_again([cell for cell in GRID if cell.seed == 1], table)
    assert len(found) == 8 and (found["seed"] == 1).all()
    assert found["auc"].tolist() == pytest.approx([0.7] * 8) and found["again"].tolist() == pytest.approx([0.72] * 8)


def test_what_the_table_does_not_hold_is_refused_before_it_is_trained(capsys):
    with pytest.raises(ValueError, match="no rows of b moco 0"):
        again.run_again(GRID, committed()[lambda table: table["dataset"] == "a"])
    assert main(["again", "--out", "nowhere"]) == 1
    assert "nothing to compare with" in capsys.readouterr().err


def test_two_runs_are_read_beside_two_seeds():
    table = committed()
    drawn = table[table["dataset"] == "a"]
    moved = drawn.assign(again=drawn["auc"] + 0.02 * (-1) ** drawn["seed"] + 0.01 * (-1) ** drawn["subset"])
    row = again.apart(moved, table).iloc[0]
    assert row["runs"] == 6, "subsets are averaged within a run"
    assert row["difference"] == pytest.approx(0.02 / 3) and row["low"] < row["difference"] < row["high"]
    assert row["size"] == pytest.approx(0.02)
    assert row["seeds"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)


@pytest.mark.parametrize(("place", "runs"), [(".", 24), (report.LATER["longer training"], 8)])
def test_what_was_run_again_belongs_to_the_committed_table(place, runs):
    table = pd.read_csv(HOME / "study" / "tables" / place / "low_label.csv")
    twice = pd.read_csv(HOME / "study" / "tables" / place / "again.csv")
    both = twice.merge(table, on=again.ROW, suffixes=("", "_committed"))
    assert len(both) == len(twice) and (both["auc"] == both["auc_committed"]).all()
    assert len(twice[twice["dataset"] != "idrid"].groupby(["dataset", "arm", "seed"])) == runs
    found = again.apart(twice, table)
    assert (found["size"] < found["seeds"]).all(), "another seed moves a result further than another run of the same"


def test_the_second_series_comes_out_equal():
    twice = pd.read_csv(HOME / "study" / "tables" / report.LATER["longer training"] / "again.csv")
    assert twice["again"].tolist() == pytest.approx(twice["auc"].tolist(), abs=3e-4)
