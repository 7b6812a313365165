"""Claims about a reader's own images: class folders or a CSV, as anyone may have them."""

import shutil

import numpy as np
import pytest
from test_data_scripts import assert_split_by_patient, noise, run_script, save

from mocolayers.data.prepared import load


@pytest.fixture
def table(tmp_path):
    """Twenty patients with two images each, in a folder whose names have spaces and umlauts, and a CSV."""
    root = tmp_path / "Bilder für alle"
    lines = ["file,grade,opacity,effusion,patient,fold"]
    for number in range(40):
        name = f"Köpfe und Füße/image {number}.png"
        save(root / name, noise())
        fold = ("train", "train", "val", "test")[number // 2 % 4]
        lines.append(f"{name},{number % 3},{number % 2},{number % 5 == 0:d},P{number // 2},{fold}")
    (root / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def folder(root, *words, csv=True):
    given = ("--csv", root / "table.csv", *words) if csv else words
    out = root.parent / "out"
    return run_script("folder", "--source", root, "--name", "own", "--side", 16, "--out", out, *given), out


def prepared(root, *words, csv=True):
    done, out = folder(root, *words, csv=csv)
    assert done.returncode == 0, done.stderr
    return load("own", out, verify=True), done.stdout


def refused(root, *words, csv=True):
    done, out = folder(root, *words, csv=csv)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(out.glob("[!.]*"))
    return done.stderr.strip().splitlines()[-1]


def test_a_table_with_patients_and_splits(table):
    data, text = prepared(table, "--label", "grade", "--patient", "patient", "--split", "fold", "--task", "ordinal")
    assert data.task == "ordinal" and data.classes == ["0", "1", "2"] and data.images.shape == (40, 16, 16, 3)
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [20, 10, 10]
    assert np.array_equal(data.labels, np.arange(40) % 3)
    assert "no patients are known" not in text and (table.parent / "out/own/contact_sheet.png").is_file()


def test_several_label_columns_are_multilabel_and_splits_are_made_by_patient(table):
    data, _ = prepared(table, "--label", "opacity", "effusion", "--patient", "patient", "--gray", "--modality", "chest")
    assert data.task == "multilabel" and data.classes == ["opacity", "effusion"] and data.channels == 1
    assert_split_by_patient(data)


def test_without_patients_the_script_says_so(table):
    data, text = prepared(table, "--label", "opacity")
    assert data.task == "binary" and len(np.unique(data.patients)) == 40
    assert "no patients are known" in text


def test_class_folders_with_the_patient_in_the_name(tmp_path):
    root = tmp_path / "scans"
    for number in range(36):
        save(root / ("benign", "malignant", "normal")[number % 3] / f"P{number // 3}_{number}.jpg", noise())
    assert "finds no group" in refused(root, "--patient-regex", "X(.)", csv=False)
    data, _ = prepared(root, "--patient-regex", r"(P\d+)_", csv=False)
    assert data.task == "multiclass" and data.classes == ["benign", "malignant", "normal"]
    assert len(np.unique(data.patients)) == 12
    assert_split_by_patient(data)


def test_class_folders_inside_split_folders(tmp_path):
    root = tmp_path / "scans"
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        for number in range(count):
            save(root / split / ("no", "yes")[number % 2] / f"{split}{number}.png", noise())
    save(root / "unlabelled" / "more" / "x.png", noise())
    data, _ = prepared(root, csv=False)
    assert [len(data.rows(s)) for s in ("train", "val", "test", "unlabelled")] == [12, 4, 6, 1]
    assert data.task == "binary" and data.labels[data.rows("test")].tolist() == [0, 0, 0, 1, 1, 1]


def class_folders(root, *classes, count=24):
    for number in range(count):
        save(root / classes[number % len(classes)] / f"{number}.png", noise())
    return root


@pytest.mark.parametrize(
    "names", [("Training", "Validation", "Testing"), ("TRAIN", "valid", "Test"), ("train", "val", "test")]
)
def test_split_folders_have_many_names(tmp_path, names):
    root = tmp_path / "scans"
    for name in names:
        class_folders(root / name, "glioma", "notumor", count=8)
    data, _ = prepared(root, csv=False)
    assert data.classes == ["glioma", "notumor"]
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [8, 8, 8]


def test_without_validation_folders_an_eighth_of_training_is_taken(tmp_path):
    root = tmp_path / "mri"
    class_folders(root / "Training", "glioma", "notumor", count=48)
    class_folders(root / "Testing", "glioma", "notumor", count=10)
    data, text = prepared(root, csv=False)
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [42, 6, 10]
    assert "an eighth of the training patients" in text


def test_the_eighth_leaves_patients_with_unlabelled_images_in_training_and_ties_equal_pictures(tmp_path):
    root, same = tmp_path / "scans", {}
    lines = ["file,label,patient,fold"]
    for number in range(160):
        fold = "test" if number >= 128 else "unlabelled" if number % 4 == 3 else "train"
        patient = number // 4 if number < 64 else number  # of the first half, each has an unlabelled image
        fold = "train" if fold == "unlabelled" and number >= 64 else fold
        pixels = same.setdefault(number // 2, noise()) if 64 <= number < 128 else noise()
        save(root / f"{number}.png", pixels)
        lines.append(f"{number}.png,{number // 2 % 2},P{patient},{fold}")
    (root / "table.csv").write_text("\n".join(lines))
    data, text = prepared(root, "--label", "label", "--patient", "patient", "--split", "fold")
    assert "an eighth of the training patients" in text
    assert [len(data.rows(s)) for s in ("val", "test", "unlabelled")] == [8, 32, 16]
    assert "0 copies of pictures in another split are left out" in text and len(data.images) == 160


def test_a_patient_that_the_table_tears_is_named_without_a_wrong_remedy(table):
    text = (table / "table.csv").read_text(encoding="utf-8").replace("P0,train", "P0,test", 1)
    (table / "table.csv").write_text(text, encoding="utf-8")
    error = refused(table, "--label", "opacity", "--patient", "patient", "--split", "fold")
    assert "two sides of the split, for example 'P0'" in error and "SCRIPT.py" not in error


def test_three_classes_are_no_binary_task(table):
    assert "--task binary wants two classes, found 3: 0, 1, 2" in refused(table, "--label", "grade", "--task", "binary")


def test_a_folder_of_images_beside_split_folders_is_named(tmp_path):
    for name in ("train", "val", "test", "extra"):
        class_folders(tmp_path / "scans" / name, "no", "yes", count=8)
    assert "extra is beside folders of splits" in refused(tmp_path / "scans", csv=False)


def test_hidden_files_and_a_folder_on_top_change_nothing(tmp_path):
    plain = class_folders(tmp_path / "plain" / "scans", "no", "yes")
    data, _ = prepared(plain, csv=False)
    root = tmp_path / "archive"
    shutil.copytree(plain, root / "scans" / "pictures")
    for path in list(plain.glob("*/*.png")):
        for hidden in ("__MACOSX/scans/pictures/{}/._{}", "scans/pictures/{}/._{}", "scans/@eaDir/{}/{}"):
            target = root / hidden.format(path.parent.name, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"\0\5\26\7")
        copy = root / "scans" / "pictures" / path.parent.name / ".ipynb_checkpoints" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    again, _ = prepared(root, csv=False)
    assert again.card["sha256"]["images"] == data.card["sha256"]["images"] and again.classes == ["no", "yes"]


def test_a_class_without_a_readable_image_is_an_error(tmp_path):
    root = class_folders(tmp_path / "scans", "no", "yes")
    save(root / "maybe" / "1.png", noise()).write_bytes(b"broken")
    assert "no readable image shows 'maybe'" in refused(root, "--skip-bad", csv=False)


@pytest.mark.parametrize(
    "words, line, said",
    [
        (("--label", "finding"), "", "it has file, grade"),
        (("--label", "grade"), "../secret.png,1,0,0,P1,train", "leads out of"),
        (("--label", "grade"), "nowhere.png,1,0,0,P1,train", "is not under"),
        (("--label", "grade"), "Köpfe und Füße/image 1.png,,0,0,P1,train", "no label for 1 images"),
        (("--label", "grade", "--split", "fold"), "Köpfe und Füße/image 1.png,1,0,0,P1,dev", "'dev' is no split"),
        (("--label", "grade", "opacity"), "", "should hold 0 and 1"),
        (("--label", "patient", "--task", "ordinal"), "", "wants numbers"),
        ((), "", "--label COLUMN"),
    ],
)
def test_what_a_table_may_have_wrong_is_named(table, words, line, said):
    with open(table / "table.csv", "a", encoding="utf-8") as file:
        file.write(line + "\n" * bool(line))
    assert said in refused(table, *words)


def test_one_class_alone_is_refused_and_a_class_missing_from_a_split_is_warned_of(table):
    text = (table / "table.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit(",", 5) for line in text[1:]]
    for row in rows:
        row[1] = "1" if row[5] == "train" and row[0].endswith("0.png") else "0"
    (table / "table.csv").write_text("\n".join([text[0], *map(",".join, rows)]), encoding="utf-8")
    _, said = prepared(table, "--label", "grade", "--patient", "patient", "--split", "fold")
    assert "warning: no val image shows '1'" in said and "warning: no test image shows '1'" in said
    for row in rows:
        row[1] = "0"
    (table / "table.csv").write_text("\n".join([text[0], *map(",".join, rows)]), encoding="utf-8")
    shutil.rmtree(table.parent / "out")
    assert "nothing to learn" in refused(table, "--label", "grade")
