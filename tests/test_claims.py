"""Claims about how the paper's claims are read from tables."""

import pandas as pd
import pytest

from mocolayers.notebook.series import HOME
from mocolayers.recipe import PRETRAINED_ARMS
from study import claims


def table(gains, **more):
    """`mse` beats `moco` by gains[dataset][seed]."""
    cells = [(dataset, seed, gain) for dataset, by_seed in gains.items() for seed, gain in enumerate(by_seed)]
    rows = [
        {"dataset": dataset, "seed": seed, "arm": arm, "auc": 0.7 + (arm == "mse") * gain} | more
        for dataset, seed, gain in cells
        for arm in ("moco", "mse")
    ]
    return pd.DataFrame(rows)


def test_differences_are_averaged_over_data_sets_within_a_seed():
    found = claims.paired_by_seed(table({"a": [0.0, 0.1], "b": [0.2, 0.1]}), "auc")
    assert found["mse"].tolist() == pytest.approx([0.1, 0.1])


def test_a_seed_that_is_missing_on_one_data_set_does_not_count():
    missing = pd.DataFrame([{"dataset": "b", "seed": 1, "arm": "moco", "auc": 0.7}])
    found = claims.paired_by_seed(pd.concat([table({"a": [0.1, 0.5], "b": [0.1]}), missing]), "auc")
    assert found["mse"].dropna().tolist() == pytest.approx([0.1])


def test_a_distance_is_claimed_to_be_lower(tmp_path):
    table({"a": [0.0, 0.01]}).assign(mode="linear", fraction=0.01).to_csv(tmp_path / "low_label.csv", index=False)
    nearer = table({"a": [-0.1, -0.11]}).rename(columns={"auc": "ks"}).assign(fraction=0.01, **{"class": "mean"})
    nearer.to_csv(tmp_path / "outputs.csv", index=False)
    found = claims.claims(tmp_path).set_index("claim")
    assert found.loc["6 outputs nearer to many labels'", "verdict"] == "supported"


def test_the_gain_that_shrinks_with_labels_is_seen(tmp_path):
    rows = [table({"a": [0.2, 0.21]}, fraction=0.01), table({"a": [0.0, 0.01]}, fraction=1.0)]
    pd.concat(rows).assign(mode="linear").to_csv(tmp_path / "low_label.csv", index=False)
    found = claims.claims(tmp_path).set_index("claim")
    shrinks = found.loc["3 gains are largest with few labels"]
    assert shrinks["difference"] == pytest.approx(0.2) and shrinks["verdict"] == "supported"
    assert not any(claim.startswith(("4", "5", "6")) for claim in found.index), "a missing table leaves its claims out"


def test_every_claim_is_answered_for_every_arm_from_the_committed_tables():
    found = claims.claims(HOME / "study" / "tables")
    assert {claim[0] for claim in found["claim"]} == set("123456")
    assert (found.groupby("claim")["arm"].nunique() == len(PRETRAINED_ARMS) - 1).all()
    assert set(found["verdict"]) <= {"supported", "opposite", "cannot tell"}
