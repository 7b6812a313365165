"""Claims about the prepared format and its splits."""

import json

import numpy as np
import pytest
from conftest import make_arrays, make_card

from mocolayers.data import prepared as datasets
from mocolayers.data.labels import label_subset
from mocolayers.data.prepared import load, save_prepared
from mocolayers.runtime import DatasetError

TASKS = ["binary", "ordinal", "multiclass", "multilabel"]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_saved_is_what_is_loaded(make_data, task):
    data = make_data(task=task)
    arrays = make_arrays(task=task)
    assert np.array_equal(data.images, arrays["images"]) and isinstance(data.images, np.memmap)
    assert np.array_equal(data.labels, arrays["labels"])
    assert data.task == task and data.side == 16 and data.channels == 1


def test_a_training_split_of_one_class_is_an_error(tmp_path):
    arrays = make_arrays()
    arrays["labels"][arrays["split"] == 0] = 1
    save_prepared(tmp_path / "one", arrays, make_card())
    with pytest.raises(DatasetError, match="same class"):
        label_subset(load("one", tmp_path), 0.5, 0)


@pytest.mark.parametrize("code", [1, 2])
def test_a_patient_on_two_sides_of_the_split_is_refused(tmp_path, code):
    arrays = make_arrays()
    first = np.flatnonzero(arrays["split"] == 0)[0]
    arrays["split"][first] = code
    with pytest.raises(DatasetError, match="two sides of the split"):
        save_prepared(tmp_path / "leak", arrays, make_card())
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_pretraining_on_a_held_out_patient_is_refused(tmp_path):
    arrays = make_arrays()
    test_patient = arrays["patients"][arrays["split"] == 2][0]
    arrays["split"][np.flatnonzero(arrays["patients"] == test_patient)[0]] = 3
    with pytest.raises(DatasetError, match="two sides of the split"):
        save_prepared(tmp_path / "leak", arrays, make_card())


def test_unlabelled_images_are_pretrained_on_and_never_judged(tmp_path):
    arrays = make_arrays()
    arrays["split"][arrays["patients"] == 0] = 3
    save_prepared(tmp_path / "more", arrays, make_card())
    data = load("more", tmp_path)
    unlabelled = set(data.rows("unlabelled"))
    assert unlabelled and unlabelled <= set(data.pretraining_rows())
    assert not unlabelled & set(label_subset(data, 1.0, 0))
    assert not set(data.pretraining_rows()) & set(data.rows("val", "test"))


def damage(folder, what):
    if what == "truncated":
        content = (folder / "images.npy").read_bytes()
        (folder / "images.npy").write_bytes(content[: len(content) // 2])
    elif what == "missing":
        (folder / "labels.npy").unlink()
    elif what == "card":
        (folder / "card.json").write_text("{not json")
    else:
        card = json.loads((folder / "card.json").read_text())
        card["counts"]["train"] += 1
        (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "what, named",
    [("truncated", "images.npy"), ("missing", "labels.npy"), ("card", "card.json"), ("counts", "the card")],
)
def test_a_damaged_folder_names_the_file_and_the_command(make_data, tmp_path, what, named):
    make_data()
    damage(tmp_path / "data" / "tiny", what)
    with pytest.raises(DatasetError, match="Rebuild it with: python data_scripts/") as caught:
        load("tiny", tmp_path / "data")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_pixel_is_found_when_asked(make_data, tmp_path):
    make_data()
    path = tmp_path / "data" / "tiny" / "images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load("tiny", tmp_path / "data")
    with pytest.raises(DatasetError, match="sha256"):
        load("tiny", tmp_path / "data", verify=True)


def test_an_unknown_name_lists_what_there_is(make_data, tmp_path):
    make_data()
    with pytest.raises(DatasetError, match="Prepared there: tiny") as caught:
        load("tinny", tmp_path / "data")
    assert "chest_phantom" in str(caught.value) and "python data_scripts/" in str(caught.value)


def test_a_phantom_is_made_on_demand(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(datasets.REBUILD, "chest_phantom", "phantoms.py --name chest_phantom --images 60")
    data = load("chest_phantom", tmp_path)
    assert len(data.images) == 60 and "synthetic" in data.card["title"]


def test_auto_prefers_real_images_and_says_which(tmp_path, monkeypatch, capsys):
    save_prepared(tmp_path / "nih", make_arrays(task="multilabel"), make_card("multilabel"))
    assert load("auto", tmp_path).name == "nih"
    assert "nih" in capsys.readouterr().out


def test_auto_without_real_images_or_a_network_takes_the_phantom(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(datasets.REBUILD, "pneumoniamnist", "medmnist.py pneumoniamnist --source no_such.npz")
    monkeypatch.setitem(datasets.REBUILD, "chest_phantom", "phantoms.py --name chest_phantom --images 60")
    assert load("auto", tmp_path).name == "chest_phantom"
    assert "synthetic" in capsys.readouterr().out


def test_the_fingerprint_changes_with_the_data(make_data):
    assert make_data("a").fingerprint == make_data("b").fingerprint
    assert make_data("c", seed=1).fingerprint != make_data("a").fingerprint


@pytest.mark.parametrize("channels, side", [(2, 16), (4, 16)])
def test_a_wrong_shape_is_refused_before_anything_is_written(tmp_path, channels, side):
    arrays = make_arrays()
    arrays["images"] = np.zeros((240, side, side, channels), np.uint8)
    with pytest.raises(DatasetError, match="expected uint8"):
        save_prepared(tmp_path / "bad", arrays, make_card())


def test_an_older_data_set_is_replaced_only_by_a_complete_one(make_data, tmp_path):
    make_data()
    arrays = make_arrays()
    arrays["labels"] = arrays["labels"] + 7
    with pytest.raises(DatasetError):
        save_prepared(tmp_path / "data" / "tiny", arrays, make_card())
    assert load("tiny", tmp_path / "data", verify=True).labels.max() == 1
