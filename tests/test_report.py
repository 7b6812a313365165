"""Claims about what is said of results: statistics, comparisons, verdicts, and the README."""

import numpy as np
import pandas as pd
import pytest

from study import figures, protocol, report


def rows(gains, fraction=0.01, **more):
    """Three arms on data sets in both protocols; `mse` beats `moco` by gains[data set][seed]."""
    found = []
    for name, by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            for arm, auc in (("random", 0.6), ("moco", 0.7), ("mse", 0.7 + gain)):
                about = {"series": "comparison", "dataset": name, "judged_on": name, "arm": arm, "fraction": fraction}
                about |= {"seed": seed, "subset": 0, "stage": 4, "source": "encoder"}
                about |= {"labels": 10, "auc": auc, "low": auc - 0.1, "high": auc + 0.1} | more
                found += [about | {"protocol": name} for name in protocol.NAMES]
    return pd.DataFrame(found)


def linear_mse(table):
    return table[(table["arm"] == "mse") & (table["protocol"] == "linear")].iloc[0]


def test_differences_are_paired_by_seed():
    mse = linear_mse(report.compared(report.paired(rows({"a": [0.01, 0.02, 0.03]}))))
    assert mse["difference"] == pytest.approx(0.02) and mse["seeds"] == 3
    # Student-t with two degrees of freedom: 4.303 * 0.01 / sqrt(3)
    assert mse["high"] - mse["difference"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)


def test_splits_of_the_same_images_widen_the_interval():
    once, again = (report.repeated([0.01, 0.02, 0.03], ratio) for ratio in (0, 0.25))
    # Nadeau and Bengio: the variance of the mean is s^2 (1/n + test/train)
    assert (again["high"] - again["mean"]) / (once["high"] - once["mean"]) == pytest.approx(((1 / 3 + 0.25) * 3) ** 0.5)
    assert again["p"] > once["p"]


def test_the_correction_keeps_the_level_where_repetitions_share_their_images():
    """Means of random halves of one sample: without the correction "no difference" is rejected far too often."""
    rng, wrong = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        images = rng.normal(0, 1, 60)
        values = [rng.permutation(images)[:30].mean() for _ in range(10)]
        wrong += [report.repeated(values, ratio)["p"] < 0.05 for ratio in (0, 1)]
    assert wrong[0] > 100 and wrong[1] < 40


def test_a_difference_at_the_margin_is_called_equal_one_time_in_twenty():
    rng = np.random.default_rng(0)
    p = [report.repeated(rng.normal(protocol.MARGIN, 0.005, 8))["p_equal"] for _ in range(2000)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)
    assert report.repeated(rng.normal(0, 0.003, 8))["p_equal"] < 0.05


def test_holm_corrects_for_the_number_of_comparisons():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]).max() == 1
    assert report.holm([0.02, float("nan"), 0.03])[[0, 2]] == pytest.approx([0.04, 0.04]), "one seed is no comparison"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.020, 0.021, 0.022, 0.023], "better"),
        ([-0.020, -0.021, -0.022, -0.023], "worse"),
        ([0.001, -0.001, 0.002, -0.002], report.EQUAL),
        ([0.05, -0.05, 0.04, -0.03], "undecided"),
        ([0.05], "undecided"),
    ],
)
def test_a_verdict_says_no_more_than_the_repetitions(values, said):
    table = report.compared(report.paired(rows({"a": values}, protocol="linear").drop_duplicates()))
    assert linear_mse(table[table["arm"] == "mse"])["verdict"] == said


def test_what_is_better_alone_may_be_undecided_among_many():
    differences = pd.DataFrame({f"arm {n}": [0.01, 0.02, 0.03, 0.015] for n in range(6)})
    differences = differences.rename_axis("seed").rename_axis(columns="arm")
    assert report.compared(differences[["arm 0"]])["verdict"].tolist() == ["better"]
    assert set(report.compared(differences)["verdict"]) == {"undecided"}


def test_every_data_set_weighs_the_same_and_a_seed_missing_on_one_does_not_count():
    assert linear_mse(report.main_claim(rows({"a": [0.0, 0.0], "b": [0.1, 0.1]})))["difference"] == pytest.approx(0.05)
    found = linear_mse(report.main_claim(rows({"a": [0.0, 0.5], "b": [0.1]})))
    assert found["difference"] == pytest.approx(0.05) and found["seeds"] == 1


def test_the_main_claim_is_read_from_the_primary_data_sets_with_few_labels():
    table = pd.concat([rows({"aptos": [0.1, 0.1], "mine": [0.9, 0.9]}), rows({"aptos": [0.5, 0.5]}, 1.0)])
    assert linear_mse(report.main_claim(table))["difference"] == pytest.approx(0.1)
    assert linear_mse(report.main_claim(rows({"mine": [0.2, 0.2]})))["difference"] == pytest.approx(0.2)


def test_one_seed_shows_the_patient_interval_instead_of_none():
    summary = report.summarise(rows({"a": [0.01]}))
    assert (summary["high"] - summary["low"]).to_numpy() == pytest.approx(0.2)


def test_pixels_and_stages_are_no_rows_of_the_main_claim():
    table = rows({"a": [0.0, 0.0]})
    others = [table.assign(auc=0.9, stage=1), table.assign(auc=0.9, source="pixels"), table.assign(series="long")]
    assert len(report.usual(pd.concat([table, *others]))) == len(table)


def test_the_claims_are_read_in_their_direction(tmp_path):
    few, many = rows({"a": [0.2, 0.21, 0.2]}), rows({"a": [0.0, 0.01, 0.0]}, 1.0)
    pd.concat([few, many]).to_csv(tmp_path / "scores.csv", index=False)
    nearer = rows({"a": [-0.1, -0.11, -0.1]}).rename(columns={"auc": "ks"}).query("protocol == 'linear'")
    nearer.assign(**{"class": "mean"}).to_csv(tmp_path / "outputs.csv", index=False)
    found = report.claims(tmp_path).set_index("claim")
    assert found.loc["6 outputs are nearer", "verdict"] == "better", "a smaller distance is claimed"
    shrinks = found.loc["3 gains are largest with few labels"]
    assert shrinks["difference"] == pytest.approx(0.2) and shrinks["verdict"] == "better"
    assert not any(claim.startswith(("4", "5")) for claim in found.index), "a missing table leaves its claims out"


def test_two_runs_are_read_beside_two_seeds():
    """A later seed is .1 better than the one before it."""
    table = pd.concat([rows({"a": [0] * 3, "b": [0] * 3}).assign(subset=subset) for subset in (0, 1)])
    table["auc"] = 0.6 + 0.1 * table["seed"]
    moved = table[table["judged_on"] == "a"]
    moved = moved.assign(again=moved["auc"] + 0.02 * (-1) ** moved["seed"] + 0.01 * (-1) ** moved["subset"])
    found = report.retest(moved, table).iloc[0]
    assert found["runs"] == 9, "subsets are averaged within a run"
    assert found["difference"] == pytest.approx(0.02 / 3) and found["size"] == pytest.approx(0.02)
    assert found["seeds"] == pytest.approx(((0.1**2 + 0.1**2 + 0.2**2) / 3) ** 0.5)


def study(gain=0.02, repetitions=12, series=tuple(protocol.SERIES)):
    """Tables of the whole study on two data sets; MoCo does not beat training from scratch on the second."""
    parts = []
    for seed in protocol.TUNING:
        gate = rows({"pneumonia": [0.0], "aptos": [0.0]}, series="gate", setting="weak", weight=1.0, pull=0.0)
        scratch = gate[gate["arm"] == "random"].assign(arm="supervised")
        scratch.loc[scratch["dataset"] == "aptos", "auc"] = 0.8
        parts += [part.assign(seed=seed) for part in (gate[gate["arm"] != "mse"], scratch)]
    for weight, more in zip(protocol.WEIGHTS["mse"], (0.01, 0.02, 0.05, 0.03), strict=True):
        tried = rows({"pneumonia": [more] * 2}, series="weights", setting="weak", pull=5 * more, weight=float(weight))
        tried = tried.assign(seed=tried["seed"] + 100)
        parts.append(tried if weight == 1 else tried[tried["arm"] == "mse"])
    noise = np.random.default_rng(0).normal(0, 0.003, (2, repetitions))
    for name, more in (("comparison", gain), ("conditions", 0.0)):
        gains = {"pneumonia": more + noise[0], "aptos": more + noise[1]}
        parts.append(rows(gains, series=name, setting="weak", weight=1.0, pull=0.0))
    parts.append(parts[-2][parts[-2]["arm"] == "random"].assign(arm="supervised"))
    table = pd.concat(parts)
    return table[table["series"].isin(series)]


def test_a_data_set_passes_the_gate_for_each_protocol_by_itself():
    passed = report.gate(study()).set_index(["dataset", "protocol"])["passes"]
    assert passed.to_dict() == {
        ("pneumonia", "linear"): True, ("pneumonia", "finetune"): True,
        ("aptos", "linear"): True, ("aptos", "finetune"): False,
    }  # fmt: skip


def test_one_losing_seed_closes_the_gate_of_linear_evaluation():
    table = study()
    lost = (table["arm"] == "moco") & (table["series"] == "gate") & (table["seed"] == 102)
    table.loc[lost & (table["dataset"] == "aptos") & (table["protocol"] == "linear"), "auc"] = 0.5
    passed = report.gate(table).set_index(["dataset", "protocol"])["passes"]
    assert not passed["aptos", "linear"] and passed["pneumonia", "linear"]


def test_what_did_not_pass_enters_no_average():
    table = study()
    table.loc[(table["dataset"] == "aptos") & (table["arm"] == "mse"), "auc"] += 0.5
    claim = report.main_claim(report.usual(table), report.gate(table)).set_index(["protocol", "arm"])["difference"]
    assert claim["finetune", "mse"] == pytest.approx(0.02, abs=0.005) and claim["linear", "mse"] > 0.2


def test_repetitions_of_the_study_are_compared_by_the_corrected_t():
    table = study()
    claim = report.main_claim(report.usual(table), report.gate(table))
    differences = report.averaged(report.paired(report.usual(table).query("protocol == 'linear'")))["mse"]
    wanted = report.repeated(differences, protocol.RATIO)
    found = claim[claim["protocol"] == "linear"].iloc[0]
    assert found["low"] == pytest.approx(wanted["low"]) and found["low"] < report.repeated(differences)["low"] - 0.001


def test_the_pull_is_beside_the_gain_and_the_best_weight_is_chosen():
    table = study()
    assert report.best_weights(table) == {"mse": 12.0}
    found = report.pulls(table).set_index(["arm", "weight"])
    assert found.loc[("mse", 12.0), ["pull", "gain"]].tolist() == pytest.approx([0.25, 0.05])
    figure = figures.gain_by_pull(table)
    drawn = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert pytest.approx([0.05, 0.1, 0.15, 0.25]) in drawn


def test_of_a_loss_whose_weights_are_half_tried_nothing_is_said():
    table = study()
    tried = table["series"] == "weights"
    for half in (table[~tried | (table["weight"] != 60)], table[~tried | (table["seed"] == 100)]):
        assert report.pulls(half).empty and "No weight of a loss has been tried yet" in report.findings(half)
        assert report.best_weights(half) == {}


def test_a_gain_that_needs_the_released_conditions_is_seen():
    found = report.conditions(study(gain=-0.03))
    assert set(found["verdict"]) == {"better"} and found["difference"].to_numpy() == pytest.approx(0.03, abs=0.001)


def test_a_difference_of_conditions_is_within_a_data_set():
    table = study(gain=-0.03)
    lost = (table["series"] == "conditions") & (table["dataset"] == "aptos")
    found = report.conditions(table[~lost])
    assert found["difference"].to_numpy() == pytest.approx(0.03, abs=0.001)


def test_a_repetition_counts_when_every_arm_has_it():
    table = study()
    lost = (table["series"] == "comparison") & (table["seed"] == 11) & (table["arm"] == "mse")
    half = table[~(lost & (table["dataset"] == "aptos"))]
    assert "11 of 12 repetitions" in report.findings(half)
    assert set(report.complete(report.usual(half))["seed"]) == set(range(11))


def test_an_arm_that_joins_late_takes_no_repetition_away():
    table = study()
    first = (table["series"] == "comparison") & (table["arm"] == "mse") & (table["seed"] < 2)
    late = table[first].assign(arm="mse-standardized")
    both = pd.concat([table, late.assign(auc=late["auc"] + 0.1)])
    assert report.repetitions(both) == 12
    claim = report.main_claim(report.complete(report.usual(both))).set_index(["protocol", "arm"])
    assert claim["seeds"]["linear", "mse"] == 12 and claim["seeds"]["linear", "mse-standardized"] == 2


def test_a_scale_has_its_own_number_of_repetitions():
    table = study(repetitions=5).assign(scale="gpu")
    assert "; 5 of 5 repetitions" in report.findings(table)


def test_what_did_not_pass_enters_no_claim(tmp_path):
    table = study()
    table.to_csv(tmp_path / "scores.csv", index=False)
    reuse = table[(table["series"] == "comparison") & (table["protocol"] == "linear")]
    reuse = reuse.rename(columns={"auc": "linear"}).drop(columns="protocol")
    reuse.loc[(reuse["dataset"] == "aptos") & (reuse["arm"] == "mse"), "linear"] += 0.5
    reuse.to_csv(tmp_path / "similarity.csv", index=False)
    found = report.claims(tmp_path).set_index("claim").loc["4 features are reused"]
    assert found["difference"] == pytest.approx(0.02, abs=0.005)


def test_second_rank_sets_choose_no_weight_and_enter_no_average():
    table = study()
    more = table.assign(dataset="odir", judged_on="odir")
    more["auc"] += np.where((more["arm"] == "mse") & (more["weight"] == 1), 0.4, 0)
    both = pd.concat([table, more])
    assert report.best_weights(both) == {"mse": 12.0}
    mean = report.main_claim(report.usual(both), report.gate(both)).set_index(["protocol", "arm"])["difference"]
    assert mean["linear", "mse"] == pytest.approx(0.02, abs=0.005)


def test_when_no_data_set_passes_that_is_the_result():
    table = study()
    table.loc[(table["series"] == "gate") & (table["arm"] == "moco"), "auc"] = 0.5
    said = report.findings(table)
    assert "No data set passed the gate" in said and "The figure has MoCo minus no pretraining on every" in said
    assert len(figures.gains(table).axes) == 2


def test_sentences_and_figure_come_from_the_numbers():
    said = report.findings(study())
    assert "(linear evaluation: aptos, pneumonia; fine-tuning: pneumonia)" in said
    assert "Linear evaluation: better on aptos, pneumonia. Fine-tuning: better on aptos, pneumonia." in said
    trained = study().query("series != 'comparison' or arm not in ['random', 'supervised']")
    assert "**Does MoCo help?**" not in report.findings(trained)
    trained = study().query("series != 'comparison' or arm != 'random'")
    assert "Linear evaluation: better" not in report.findings(trained) and "Fine-tuning: better" in said
    assert "in the figure, they change MoCo's AUC by +0.020 to +0.020. The paper reports about 5%" in said
    assert "2 of the 2 intervals at 1% are below it." in said and "; 12 of 12 repetitions): 2 better." in said
    assert "AUC by +0.050 to +0.050 (the choice flatters them). With the largest, where they have 15%" in said
    assert (
        "of the gradient, they change it by +0.030 to +0.030. (Means over 1 data sets and 2 seeds.) The paper's" in said
    )
    assert said.endswith("`mse-standardized`, the weights of `barlow`, the weights of `barlow-conditioned`.")
    figure = figures.gains(study())
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["Linear evaluation", "Fine-tuning"] and "with 1% of the labels? 12" in figure.get_suptitle()
    rows = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes]
    assert rows[0] == ["aptos", "pneumonia"]
    drawn = [[container.lines[0].get_xydata().tolist() for container in axis.containers] for axis in figure.axes]
    assert [len(lines) for lines in drawn] == [1, 1]  # of the leading arms the study has one
    assert [len(lines[0]) for lines in drawn] == [2, 1] and drawn[0][0][0][0] == pytest.approx(0.02, abs=0.01)


def test_ranges_go_from_the_lowest_to_the_highest_of_the_primary_family():
    about = {"family": "primary", "protocol": "linear", "verdict": "undecided", "fraction": 0.01}
    claim = [{"arm": "mse", "difference": 0.03, "high": 0.06}, {"arm": "barlow-conditioned", "difference": -0.01}]
    claim = pd.DataFrame([about | row for row in claim]).fillna({"high": 0.01})
    claim = pd.concat([claim, claim.iloc[:1].assign(family="secondary", difference=0.2)])
    said = report._comparison_said(claim, 3, 12)
    assert "AUC by -0.010 to +0.030" in said and "1 of the 2 intervals at 1% are below" in said
    assert "Of 2 comparisons (2 losses, 1 ways to judge, 1% and 10% of the labels; 3 of 12 repetitions)" in said
    assert "no average" in report._comparison_said(claim.iloc[2:], 3, 12)


@pytest.mark.parametrize("value, said", [(0.0004, "0.000"), (-0.0004, "0.000"), (-0.02, "-0.020"), (np.nan, "+nan")])
def test_a_difference_has_its_sign_unless_it_rounds_to_nothing(value, said):
    assert report.signed(value) == said


def test_what_has_not_been_run_is_said():
    said = report.findings(study(series=("gate",)))
    assert "The figure has MoCo minus no pretraining" in said and "No weight of a loss has been tried yet" in said
    assert "The comparison of the arms has fewer than two repetitions" in said and "*comparison* (do they" in said
    assert [axis.get_title(loc="left") for axis in figures.gains(study(series=("gate",))).axes] == [
        "Linear evaluation",
        "Fine-tuning",
    ]


def test_one_repetition_says_nothing_of_the_arms():
    table = study()
    once = table[(table["series"] != "comparison") | (table["seed"] == 0)]
    assert report.repetitions(table) == 12 and report.repetitions(once) == 1
    assert "fewer than two repetitions" in report.findings(once) and "nan" not in report.findings(once)
    assert figures.gains(once).get_suptitle().startswith("Does pretraining help")


@pytest.mark.parametrize(
    ("series", "arms", "worse"),
    [
        (("gate",), None, False),
        (("gate", "weights"), ["moco", *protocol.UNTRAINED], False),
        (("gate", "comparison"), ["moco", *protocol.UNTRAINED], False),
        (("gate", "comparison"), ["mse", *protocol.UNTRAINED], False),
        (tuple(protocol.SERIES), None, True),
    ],
)
def test_a_part_of_the_study_has_sentences_a_figure_and_a_page(tmp_path, series, arms, worse):
    table = study(series=series)
    table = table[(table["series"] == "gate") | table["arm"].isin(arms or table["arm"])]
    table.loc[(table["series"] == "gate") & (table["arm"] == "moco") & worse, "auc"] = 0.1
    table.to_csv(tmp_path / "scores.csv", index=False)
    scores = report.read("scores", folder=tmp_path)
    assert figures.gains(scores).get_suptitle().startswith("Does pretraining help")
    assert "MoCo minus no pretraining on every data set" in report.findings(scores)
    page = report.page(tmp_path)
    assert "## The gate" in page and "main claim" not in page and "Claim by claim" not in page


def test_the_readme_takes_the_findings_between_its_marks(tmp_path):
    study().to_csv(tmp_path / "scores.csv", index=False)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{protocol.BEGIN}\nstale words\n{protocol.END}\nafter")
    report.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "stale" not in text and "Do losses" in text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write_readme(readme, tmp_path)


def test_the_readme_says_what_the_committed_tables_say():
    text = protocol.README.read_text(encoding="utf-8")
    assert report.findings(report.read("scores", folder=protocol.TABLES)) in text, "run: python -m study report"


def test_the_page_of_tables_is_that_of_the_committed_tables():
    page = protocol.PAGE.read_text(encoding="utf-8")
    assert page == report.page(protocol.TABLES), "run: python -m study report"
    assert "The main claim" in page and "Claim by claim" in page and "nan" not in page.lower()


def test_a_data_set_may_have_the_name_of_a_number_or_of_nothing(tmp_path):
    table = study().replace({"pneumonia": "007", "aptos": "NA"})
    table.to_csv(tmp_path / "scores.csv", index=False)
    assert set(report.read("scores", folder=tmp_path)["dataset"]) == {"007", "NA"}


def test_the_second_rank_has_tables_of_its_own_and_changes_no_other(tmp_path):
    def told(table):
        table.to_csv(tmp_path / "scores.csv", index=False)
        return report.page(tmp_path)

    main = study()
    second = main.query("judged_on == 'pneumonia' and series == 'comparison'")
    second = second.assign(dataset="odir", judged_on="odir", auc=1 - second["auc"])
    gate = main.query("judged_on == 'pneumonia' and series == 'gate'").assign(dataset="odir", judged_on="odir")
    failed = gate.assign(auc=1 - gate["auc"])
    for more, passed in ((gate, True), (failed, False)):
        alone, both = told(pd.concat([main, more])), told(pd.concat([main, more, second]))
        assert both.startswith(alone) and "second rank" not in alone and both.count("<td>odir</td>") >= 4
        assert ("mean over its data sets that passed" in both) == passed
    twice = main.query("judged_on == 'aptos'").assign(again=0.5)
    assert report.retest(twice, main).equals(report.retest(twice, pd.concat([main, second])))


def test_the_committed_tables_hold_no_row_twice_and_every_arm_had_the_same_labels():
    table = report.read("scores", folder=protocol.TABLES)
    assert len(table) and not table.duplicated([key for key in protocol.KEYS if key in table]).any()
    same = ["series", "dataset", "judged_on", "seed", "protocol", "fraction"]
    assert (table.groupby(same)["labels"].nunique() == 1).all()


def test_the_readme_says_how_far_rounding_moves_a_run():
    assert "about half as far as another repetition" in protocol.README.read_text(encoding="utf-8")
    rows, again = report.complete(report.usual(report.read("scores"))), report.read("again_elsewhere")
    moved = report.retest(report.usual(again), rows)
    assert 0.4 < (moved["size"] / moved["seeds"]).mean() < 0.6
