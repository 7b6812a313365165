"""Claims about the prepared format and its splits."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_arrays, make_card

from mocolayers.data import prepared as datasets
from mocolayers.data.labels import label_subset
from mocolayers.data.prepared import data_folder, load, save_prepared
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


@pytest.mark.parametrize(("task", "classes"), [("binary", ["a", "b", "c"]), ("binary", ["a"]), ("multilabel", ["a"])])
def test_a_task_has_as_many_classes_as_it_needs(tmp_path, task, classes):
    arrays, card = make_arrays(), make_card() | {"task": task, "classes": classes}
    arrays["labels"] = arrays["labels"][:, None] if task == "multilabel" else arrays["labels"] * (len(classes) > 1)
    with pytest.raises(DatasetError, match="expected a list of two names or more, two for a binary task$"):
        save_prepared(tmp_path / "few", arrays, card)


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
    elif what == "objects":
        np.save(folder / "labels.npy", np.array([{}] * 240))
    elif what == "a zip":
        np.savez(folder / "patients.npz", np.arange(240))
        (folder / "patients.npz").rename(folder / "patients.npy")
    elif what == "a split of fractions":
        np.save(folder / "split.npy", np.load(folder / "split.npy").astype(float))
    else:
        card = json.loads((folder / "card.json").read_text())
        card[what] = 2
        (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "what, named",
    [
        ("truncated", "images.npy"),
        ("missing", "labels.npy"),
        ("objects", "labels.npy"),
        ("a zip", "patients.npy"),
        ("a split of fractions", "split.npy"),
        ("card", "card.json"),
        ("sha256", "card.json"),
        ("classes", "card.json"),
    ],
)
def test_a_damaged_folder_names_the_file_and_the_command(make_data, tmp_path, what, named):
    make_data()
    damage(tmp_path / "data" / "tiny", what)
    with pytest.raises(DatasetError, match="[Mm]ake it again: python data_scripts/") as caught:
        load("tiny", tmp_path / "data")
    assert named in str(caught.value) and "\n" not in str(caught.value) and "allow_pickle" not in str(caught.value)


def change(path):
    """Flip the last bit of a file, with the same size and, if the clock allows, the same time."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["labels", "patients", "split"])
def test_an_array_changed_by_hand_is_noticed_and_is_another_data_set(tmp_path, capsys, name):
    arrays = make_arrays(per_patient=1)
    save_prepared(tmp_path / "tiny", arrays, make_card())
    before = load("tiny", tmp_path)
    assert "changed" not in capsys.readouterr().out
    arrays[name] = np.roll(arrays[name], 1, axis=0)
    np.save(tmp_path / "tiny" / f"{name}.npy", arrays[name])
    after = load("tiny", tmp_path)
    assert f"{name}.npy was changed" in capsys.readouterr().out
    assert np.array_equal(getattr(after, name), arrays[name]) and after.fingerprint != before.fingerprint
    assert load("tiny", tmp_path).fingerprint == after.fingerprint
    with pytest.raises(DatasetError, match=f"{name}.npy: its sha256"):
        load("tiny", tmp_path, verify=True)


def test_the_bytes_of_images_are_read_on_request_only(make_data, tmp_path):
    first = make_data().fingerprint
    change(tmp_path / "data" / "tiny" / "images.npy")
    assert load("tiny", tmp_path / "data").fingerprint == first
    with pytest.raises(DatasetError, match="images.npy: its sha256"):
        load("tiny", tmp_path / "data", verify=True)


def test_a_patient_moved_to_another_split_by_hand_is_taken_as_it_is(make_data, tmp_path):
    before = make_data()
    split = before.split.copy()
    split[before.patients == before.patients[before.rows("test")[0]]] = 0
    np.save(tmp_path / "data" / "tiny" / "split.npy", split)
    after = load("tiny", tmp_path / "data")
    assert after.card["counts"]["test"] == len(after.rows("test")) < len(before.rows("test"))


def test_a_copied_data_set_has_the_same_fingerprint(make_data, tmp_path, capsys):
    first = make_data().fingerprint
    shutil.copytree(tmp_path / "data" / "tiny", tmp_path / "data" / "copy", copy_function=shutil.copyfile)
    assert load("copy", tmp_path / "data").fingerprint == first
    assert "changed" not in capsys.readouterr().out


def test_another_split_is_another_fingerprint_on_the_same_images(make_data):
    data = make_data()
    other = data.with_split(np.roll(data.split, 3))
    assert other.images is data.images and other.fingerprint != data.fingerprint
    assert other.card["counts"]["test"] == len(other.rows("test")) and other.with_split(data.split).side == 16
    assert other.fingerprint == data.with_split(np.roll(data.split, 3)).fingerprint


def test_an_unknown_name_lists_what_there_is(make_data, tmp_path):
    make_data()
    with pytest.raises(DatasetError, match="Prepared there: tiny") as caught:
        load("tinny", tmp_path / "data")
    assert "chest_phantom" in str(caught.value) and "python data_scripts/" in str(caught.value)


@pytest.mark.parametrize("name", ["nih", "retina", "breast_histology", "pneumonia"])
def test_a_publishers_set_that_is_not_prepared_names_its_script(tmp_path, name):
    with pytest.raises(DatasetError, match=f"with: python data_scripts/{name}.py --source PATH$"):
        load(name, tmp_path)
    assert (datasets.SCRIPTS / f"{name}.py").is_file()


def test_a_phantom_is_made_on_demand(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(datasets.REBUILD, "chest_phantom", "phantoms.py --name chest_phantom --images 60")
    data = load("chest_phantom", tmp_path)
    assert len(data.images) == 60 and "synthetic" in data.card["title"]


def prepare(root, *names):
    for name in names:
        save_prepared(root / name, make_arrays(), make_card())


def test_auto_takes_the_only_real_data_set_also_a_readers_own(tmp_path, capsys):
    prepare(tmp_path, "scans", "chest_phantom")
    assert load("auto", tmp_path).name == "scans"
    assert capsys.readouterr().out == 'load("auto"): scans, the only one prepared\n'


def test_auto_takes_the_first_known_of_several_and_says_what_else_there_is(tmp_path, capsys):
    prepare(tmp_path, "scans", "retina", "nih", "another")
    assert load("auto", tmp_path).name == "nih"
    said = capsys.readouterr().out
    assert "nih, the first of those that are prepared" in said and "also another, retina, scans" in said


def test_auto_without_real_images_or_a_network_takes_the_phantom(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(datasets.REBUILD, "pneumoniamnist", "medmnist_sets.py pneumoniamnist --source no_such.npz")
    monkeypatch.setitem(datasets.REBUILD, "chest_phantom", "phantoms.py --name chest_phantom --images 60")
    assert load("auto", tmp_path).name == "chest_phantom"
    said = capsys.readouterr().out
    assert "synthetic" in said and "no_such.npz does not exist" in said, "the true reason"


@pytest.mark.parametrize("name", ["chest_phantom", "auto"])
def test_an_installed_package_says_where_the_scripts_are(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets, "SCRIPTS", tmp_path / "no" / "data_scripts")
    with pytest.raises(DatasetError, match="phantoms.py is not part of the installed package; get it from"):
        load(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data_folder().resolve() == tmp_path / "data", "and not a folder among the installed packages"


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
