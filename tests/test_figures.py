"""Figures show every row they are given, where it belongs, and an arm looks the same in all of them."""

import base64
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from mocolayers.notebook import figures, schematics
from mocolayers.recipe import ARMS

STAGES = pd.DataFrame(
    {"arm": ["moco"] * 3 + ["mse"] * 3, "stage": [1, 2, 3] * 2, "auc": [0.6, 0.7, 0.8, 0.5, 0.6, 0.9]}
)


def curves(axis) -> dict:
    """Label, colour, marker and values of what has a place in the legend."""
    handles, labels = axis.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    return dict(zip(labels, lines, strict=True))


def texts_of_legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_arm_has_a_colour_and_a_marker_of_its_own():
    assert set(figures.ARM_COLOURS) == set(figures.ARM_MARKERS) == set(ARMS)
    assert len(set(figures.ARM_COLOURS.values())) == len(set(figures.ARM_MARKERS.values())) == len(ARMS)


def test_an_arm_looks_the_same_in_any_company():
    alone, beside = (
        figures.panels(STAGES.query(f"arm in {arms}"), "stage", "auc") for arms in (["mse"], ["moco", "mse"])
    )
    looks = [(line.get_color(), line.get_marker()) for line in (curves(f.axes[0])["mse"] for f in (alone, beside))]
    assert looks[0] == looks[1] == (figures.ARM_COLOURS["mse"], figures.ARM_MARKERS["mse"])


def test_an_arm_of_ones_own_is_drawn_in_a_colour_that_no_arm_has():
    figure = figures.panels(STAGES.replace({"arm": {"mse": "cosine"}}), "stage", "auc")
    line = curves(figure.axes[0])["cosine"]
    assert list(line.get_ydata()) == [0.5, 0.6, 0.9]
    assert line.get_color() not in figures.ARM_COLOURS.values()


@pytest.mark.parametrize("first", ["moco", "cosine"])
def test_twelve_names_have_looks_of_their_own(first):
    found = figures.looks([first, *(f"mse x{n}" for n in range(11))]).values()
    assert len({(look["color"], look["marker"]) for look in found}) == 12


def test_each_panel_shows_its_own_rows_and_the_legend_names_the_arms_of_all():
    table = STAGES.assign(panel=np.where(STAGES["arm"] == "moco", "right", "left"))
    figure = figures.panels(table, "stage", "auc")
    assert {axis.get_title(loc="left"): list(curves(axis)) for axis in figure.axes} == {
        "right": ["moco"],
        "left": ["mse"],
    }
    assert texts_of_legend(figure) == ["moco", "mse"]


def test_the_legend_lists_arms_in_one_order_whatever_the_rows_order():
    first = figures.panels(STAGES.assign(panel=STAGES["arm"]), "stage", "auc")
    last = figures.panels(STAGES.iloc[::-1].assign(panel=STAGES["arm"].iloc[::-1]), "stage", "auc")
    assert texts_of_legend(first) == texts_of_legend(last)


def test_a_row_without_a_place_is_a_line_across_its_panel():
    level = pd.DataFrame({"arm": ["raw pixels"], "stage": [np.nan], "auc": [0.55]})
    line = curves(figures.panels(pd.concat([STAGES, level]), "stage", "auc").axes[0])["raw pixels"]
    assert list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == [0.55, 0.55]


@pytest.mark.parametrize("join", [False, True])
def test_arms_that_are_not_in_front_are_pale_and_have_one_name_together(join):
    table = pd.concat([STAGES, STAGES.replace({"arm": {"mse": "barlow", "moco": "random"}})], ignore_index=True)
    table = table.assign(low=table["auc"] - 0.02, high=table["auc"] + 0.02)
    figure = figures.panels(table, "stage", "auc", front=("moco", "mse"), join=join)
    assert texts_of_legend(figure) == ["moco", "mse", "other arms"]
    axis = figure.axes[0]
    pale = [line for line in axis.lines if line.get_label() == "other arms"]
    assert [list(line.get_ydata()) for line in pale] == [[0.6, 0.7, 0.8], [0.5, 0.6, 0.9]]
    assert {line.get_color() for line in pale}.isdisjoint(figures.ARM_COLOURS.values())
    assert len(axis.containers) == 2


@pytest.mark.parametrize("sideways", [False, True])
def test_whiskers_end_at_low_and_high_and_do_not_cover_one_another(sideways):
    table = STAGES.assign(
        low=STAGES["auc"] - 0.02, high=STAGES["auc"] + 0.05, name="stage " + STAGES["stage"].astype(str)
    )
    figure = figures.panels(table, *(("auc", "name") if sideways else ("stage", "auc")), join=False)
    figures.rendered(figure)  # the layout is made
    axis = figure.axes[0]
    value = 0 if sideways else 1
    whiskers = [c for c in axis.collections if len(c.get_segments()) == 3]
    found = {name: whisker.get_segments() for name, whisker in zip(("moco", "mse"), whiskers, strict=True)}
    for name, part in table.groupby("arm"):
        assert np.allclose([s[:, value] for s in found[name]], part[["low", "high"]])
    middle = [whisker.get_transform().transform([0, 0]) for whisker in whiskers]
    assert np.abs(middle[0] - middle[1])[1 - value] > 5  # pixels
    assert np.abs(middle[0] - middle[1])[value] < 1e-6


def test_an_interval_beside_its_value_is_drawn():
    table = STAGES.assign(low=STAGES["auc"] + 0.01, high=STAGES["auc"] + 0.02)
    for x, y in (("stage", "auc"), ("auc", "arm")):
        assert figures.panels(table, x, y, join=False).axes


def test_log_axes_work_with_whiskers_that_are_moved_apart():
    table = STAGES.assign(low=STAGES["auc"] - 0.02, high=STAGES["auc"] + 0.05, labels=10.0 ** (STAGES["stage"] - 3))
    figure = figures.panels(table, "labels", "auc")
    figure.axes[0].set_xscale("log")
    assert figures.rendered(figure).startswith(b"\x89PNG")
    low, high = figure.axes[0].get_xlim()
    assert 0.001 < low < 0.01 and 1 < high < 10


def test_a_forest_has_lines_at_zero_and_at_the_claim_in_every_panel():
    table = STAGES.rename(columns={"auc": "difference"}).assign(name="a set", panel=STAGES["stage"].astype(str))
    table = table.assign(low=table["difference"] - 0.1, high=table["difference"] + 0.1)
    figure = figures.forest(table, "title", "AUC", claimed=dict.fromkeys(table["panel"], 0.05))
    assert len(figure.axes) == 3 and "claimed +0.05" in texts_of_legend(figure)
    for axis in figure.axes:
        assert {0.0, 0.05} <= {line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2}


def test_histories_show_each_monitor_of_each_arm_without_its_gaps():
    log = pd.DataFrame({"step": [0, 5, 10], "loss": [3.0, 2.0, 1.0], "knn": [np.nan, 0.6, np.nan]})
    figure = figures.histories({"moco": log, "mse": log.drop(columns="knn")}, {"loss": "loss", "knn": "kNN AUC"}, "")
    loss, knn = (curves(axis) for axis in figure.axes)
    assert set(loss) == {"moco", "mse"} and set(knn) == {"moco"}
    assert list(loss["moco"].get_xdata()) == [0, 5, 10] and list(knn["moco"].get_xdata()) == [5]
    later = figures.histories({"moco": log}, {"loss": "loss"}, "", after=4)
    assert list(curves(later.axes[0])["moco"].get_xdata()) == [5, 10]


def test_a_grid_writes_every_number_and_parts_its_colours_at_zero():
    table = pd.DataFrame([[0.1, -0.4], [0.2, 0.3]], index=["a", "b"], columns=["x", "y"])
    axis = figures.grids({"name": table}, "title").axes[0]
    assert [text.get_text() for text in axis.texts] == ["+0.100", "-0.400", "+0.200", "+0.300"]
    assert axis.images[0].get_clim() == (-0.4, 0.4)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]


def test_a_sheet_holds_pictures_of_every_kind_at_one_size():
    gray = np.full((4, 4, 1), 7, np.uint8)
    view = np.full((1, 4, 4), 0.5, np.float32)
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    axis = figures.image_sheet({"a": [gray, view, colours], "b": [np.eye(2)]}, heads=("one",)).axes[0]
    sheet = axis.images[0].get_array()
    assert (sheet[:4, :4] == 7).all() and (sheet[:4, 5:9] == 127).all()
    assert (sheet[0, 10] == [0, 1, 2]).all() and (sheet[3, 13] == [9, 10, 11]).all()
    assert (sheet[5, 0] == sheet[8, 3]).all() and (sheet[5, 0] != sheet[5, 3]).any()
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]


SCHEMATICS = {"moco": schematics.moco(), "taps": schematics.moco(taps=True), "data": schematics.data_way()}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", SCHEMATICS)
def test_a_schematic_is_a_picture_with_a_text_and_keeps_its_words_inside(name):
    drawing = SCHEMATICS[name]
    page = drawing._repr_mimebundle_()["text/html"]
    picture = ElementTree.fromstring(base64.b64decode(re.search("base64,([^']+)", page)[1]))
    assert f"alt='{drawing.alt}'" in page and picture.find(f"{SVG}title").text == drawing.alt
    _, _, width, height = map(float, picture.get("viewBox").split())
    for text in picture.iter(f"{SVG}text"):
        size = float(text.get("font-size"))
        reach = 0.5 * size * len(text.text) * {"middle": 0.5, "end": 1}[text.get("text-anchor")]
        assert float(text.get("x")) - reach >= 0 and 0 < float(text.get("y")) < height - 0.25 * size
        assert text.get("text-anchor") == "end" or float(text.get("x")) + reach <= width
    for box in picture.findall(f"{SVG}rect")[1:]:
        assert float(box.get("x")) >= 0 and float(box.get("x")) + float(box.get("width")) <= width


def test_only_the_taps_have_a_loss_on_every_stage():
    words = {name: "".join(ElementTree.fromstring(drawing.svg).itertext()) for name, drawing in SCHEMATICS.items()}
    for stage in "1234":
        assert f"L{stage}" in words["taps"] and f"L{stage}" not in words["moco"]
        assert words["moco"].count(f"stage{stage}") == 2


def test_a_figure_says_in_words_what_it_shows():
    figure = figures.panels(STAGES.assign(panel="linear"), "stage", "auc", title="Where?", xlabel="stage", ylabel="AUC")
    assert figures.described(figure) == "Where? linear; AUC; stage; moco, mse."
    sheet = figures.image_sheet({"query": [np.zeros((4, 4, 1), np.uint8)]}, "Neighbours")
    assert figures.described(sheet) == "Neighbours. query."


def test_bars_are_stacked_from_the_first_row_down_or_beside_one_another_over_chance():
    table = pd.DataFrame({"a": [0.2, 0.4], "b": [0.8, 0.6]}, index=["one", "two"])
    axis = figures.stacked_bars(table, "title", "share").axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["two", "one"]
    assert np.allclose([[bar.get_width() for bar in group] for group in axis.containers], [[0.4, 0.2], [0.6, 0.8]])
    assert np.allclose([bar.get_x() for bar in axis.containers[1]], [0.4, 0.2])
    axis = figures.grouped_bars(table, "title", "AUC", 0.5).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.20", "0.40", "0.80", "0.60"]
    assert axis.get_ylabel() == "AUC" and list(axis.lines[0].get_ydata()) == [0.5, 0.5]
