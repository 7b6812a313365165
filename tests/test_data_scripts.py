"""Claims about the scripts, on tiny trees in each publisher's own layout, and on real samples where they are."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from mocolayers.data.labels import label_subset
from mocolayers.data.prepared import SCRIPTS, load

RNG = np.random.default_rng(0)


def run_script(name, *words):
    one = ["--workers", "1"] if name != "medmnist_sets" else []
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, words), *one]
    return subprocess.run(command, capture_output=True, text=True)


def prepare(name, source, out, *words):
    done = run_script(name, "--source", source, "--out", out, "--side", 16, *words)
    assert done.returncode == 0, done.stderr
    return load(name, out, verify=True), done.stdout


def fails(name, source, out, *words):
    done = run_script(name, "--source", source, "--out", out, "--side", 16, *words)
    assert done.returncode == 1 and not list(out.glob("[!.]*")), "nothing stands under a final name"
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def noise(height=40, width=40, channels=3):
    return RNG.integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze()


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def assert_split_by_patient(data):
    sides = [set(data.patients[data.rows(split)]) for split in ("train", "val", "test")]
    assert all(sides) and not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])


@pytest.fixture
def breast(tmp_path):
    for patient in range(100, 115):
        for number, (height, width) in enumerate([(50, 50), (50, 27), (50, 1), (50, 50)]):
            label = number % 2
            name = f"{patient}_idx5_x{number}_y{number}_class{label}.png"
            save(tmp_path / "breast tree é" / str(patient) / str(label) / name, noise(height, width))
    return tmp_path / "breast tree é"


def test_breast_edge_patches_are_filled_and_counted(breast, tmp_path):
    data, text = prepare("breast_histology", breast, tmp_path / "out")
    assert data.images.shape == (60, 16, 16, 3) and data.classes == ["no IDC", "IDC"]
    assert "edge patches filled by mirroring: 30" in text
    assert data.card["report"]["notes"] == {"edge patches filled by mirroring": 30}
    assert_split_by_patient(data)
    assert data.labels.sum() == 30


def test_breast_patches_larger_than_the_publishers_are_taken_whole_and_counted(breast, tmp_path):
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[50:] = 200
    save(breast / "100" / "0" / "100_idx5_x9_y9_class0.png", pixels)
    data, text = prepare("breast_histology", breast, tmp_path / "out")
    assert "patches larger than the publisher's 50 px: 1" in text
    (row,) = [image for image in data.images if np.array_equal(np.unique(image), [0, 200])]
    assert (row[:8] == 0).all() and (row[8:] == 200).all()


def test_medmnist_offers_no_option_that_it_does_not_use():
    words = "--range 0 1 --window percentile --skip-bad --seed 1"
    assert f"unrecognized arguments: {words}" in run_script("medmnist_sets", "pneumoniamnist", *words.split()).stderr


def test_breast_patches_with_another_ending_are_read_too(breast, tmp_path):
    before, _ = prepare("breast_histology", breast, tmp_path / "before")
    for path in breast.rglob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    after, _ = prepare("breast_histology", breast, tmp_path / "after")
    assert before.card["sha256"] == after.card["sha256"]


def test_breast_folder_and_file_name_must_agree(breast, tmp_path):
    save(breast / "100" / "0" / "100_idx5_x9_y9_class1.png", noise(50, 50))
    assert "name and folder disagree" in fails("breast_histology", breast, tmp_path / "out")


def test_a_corrupt_image_is_an_error_that_names_it_or_is_listed(breast, tmp_path):
    bad = breast / "100" / "0" / "100_idx5_x9_y9_class0.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for _ in range(2):
        message = fails("breast_histology", breast, tmp_path / "out")
        assert bad.name in message and "damaged, or no image" in message and "--skip-bad" in message
    data, text = prepare("breast_histology", breast, tmp_path / "out", "--skip-bad")
    assert len(data.images) == 60 and bad.name in text
    assert bad.name in data.card["report"]["skipped"][0]


def test_an_image_that_was_broken_is_read_again_when_it_is_mended(breast, tmp_path):
    path = breast / "100" / "0" / "100_idx5_x9_y9_class0.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert path.name in fails("breast_histology", breast, tmp_path / "out")
    times = path.stat()
    save(path, noise(50, 50))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    data, _ = prepare("breast_histology", breast, tmp_path / "out")
    assert len(data.images) == 61


def nih_tree(root, patients, findings="Mass|Nodule", first=0):
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    ]
    for patient in patients:
        for number in range(2):
            name = f"{patient:08d}_{number + first:03d}.png"
            label = findings if (patient + number) % 2 else "No Finding"
            lines.append(f"{name},{label},{number},{patient},50,M,PA,2682,2749,0.143,0.143,")
            save(root / "images_001" / "images" / name, noise(channels=1))
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root


def test_nih_reads_odd_modes_and_fourteen_labels(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 21))
    save(tree / "images_001/images/00000001_000.png", noise(), "RGBA")
    deep = (RNG.random((40, 40)) * 65535).astype(np.uint16)
    Image.fromarray(deep).save(tree / "images_001/images/00000002_000.png")
    data, text = prepare("nih", tree, tmp_path / "out")
    assert data.images.shape == (40, 16, 16, 1) and data.labels.shape == (40, 14)
    assert data.labels[:, data.classes.index("Mass")].sum() == 20
    assert "RGBA images turned gray: 1" in text
    assert_split_by_patient(data)
    sixteen_bit = data.images[2].mean()
    assert 100 < sixteen_bit < 155, "scaled, not cut off"


def test_nih_follows_given_lists(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 7))
    names = sorted(p.name for p in tree.glob("images_001/images/*.png"))
    for part, chosen in (("train", names[:6]), ("val", names[6:8]), ("test", names[8:])):
        (tree / f"{part}_list.txt").write_text("\n".join(chosen))
    data, _ = prepare("nih", tree, tmp_path / "out")
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [6, 2, 4]
    (tree / "train_list.txt").write_text("\n".join(names[:6]), encoding="utf-8-sig")
    (tree / "train_val_list.txt").write_text("\n".join(names[:8]))
    again, _ = prepare("nih", tree, tmp_path / "again")
    assert np.array_equal(again.split, data.split), "a list of validation is not passed over"
    (tree / "test_list.txt").write_text("")
    assert "stands in none of" in fails("nih", tree, tmp_path / "other")


def test_nih_unlabelled_images_leave_judged_patients_and_known_images_out(tmp_path):
    tree, more = nih_tree(tmp_path / "nih", range(1, 21)), nih_tree(tmp_path / "more", range(1, 41))
    nih_tree(tmp_path / "more", range(1, 41), first=1)
    data, _ = prepare("nih", tree, tmp_path / "out", "--unlabelled", more)
    extra = set(data.patients[data.rows("unlabelled")])
    assert extra and not extra & set(data.patients[data.rows("val", "test")])
    # Follow-up 001 of every patient stands in both trees; only 002 of a training patient is new.
    train = set(data.patients[data.rows("train")])
    assert len(data.rows("unlabelled")) == len(train) + 2 * 20


def test_nih_a_path_that_leaves_the_folder_is_refused(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 7))
    save(tmp_path / "secret.png", noise(channels=1))
    with open(tree / "Data_Entry_2017.csv", "a") as file:
        file.write("../secret.png,Mass,0,3,50\n")
    assert "leads out of" in fails("nih", tree, tmp_path / "out")


@pytest.mark.parametrize(
    "line, said",
    [
        ("00000099_000.png,Mass,0,99,1", "does not exist: 1 of"),
        ("00000001_000.png,Mass,0,P3,1", "no number"),
        ("00000001_000.png,Cold,0,1,1", "Cold"),
    ],
)
def test_nih_a_missing_image_or_an_unknown_finding_is_named(tmp_path, line, said):
    tree = nih_tree(tmp_path / "nih", range(1, 7))
    with open(tree / "Data_Entry_2017.csv", "a") as file:
        file.write(line + "\n")
    assert said in fails("nih", tree, tmp_path / "out")


def fundus(border=20, size=120):
    """A textured bright disc on a noisy black border, off the centre."""
    y, x = np.mgrid[:size, : size + 2 * border]
    disc = (y - size / 2) ** 2 + (x - border - size / 2) ** 2 < (size / 2) ** 2
    pixels = RNG.integers(0, 12, (*disc.shape, 3))
    pixels[disc] += RNG.integers(60, 200, (int(disc.sum()), 3))
    return pixels.astype(np.uint8)


def eyepacs_tree(root, patients=24):
    lines = ["image,level"]
    for patient in range(patients):
        for side in ("left", "right"):
            lines.append(f"{patient}_{side},{patient % 5}")
            save(root / "train" / f"{patient}_{side}.jpeg", fundus())
    (root / "trainLabels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_eyepacs_both_eyes_of_a_patient_stay_together_and_grades_are_kept(tmp_path):
    data, text = prepare("retina", eyepacs_tree(tmp_path / "eyes"), tmp_path / "out")
    assert_split_by_patient(data)
    assert np.unique(data.patients, return_counts=True)[1].tolist() == [2] * 24
    grades = np.load(tmp_path / "out/retina/grades.npy")
    assert np.array_equal(data.labels, grades >= 2) and set(grades) == set(range(5))
    assert "border cropped: 48" in text
    corners, edges = data.images[:, 0, 0].mean(), data.images[:, 7:9, 0].mean()
    assert corners < 30 and edges > 40, "the disc reaches the sides and the corners stay dark"


def test_eyepacs_takes_the_competitions_test_images_where_their_labels_are(tmp_path):
    tree = eyepacs_tree(tmp_path / "eyes")
    save(tree / "test" / "900_left.jpeg", fundus())
    assert len(prepare("retina", tree, tmp_path / "out")[0].images) == 48
    (tree / "retinopathy_solution.csv").write_text("image,level,Usage\n900_left,4,Private\n")
    assert len(prepare("retina", tree, tmp_path / "more")[0].images) == 49


def test_retina_grades_can_be_the_task(tmp_path):
    data, _ = prepare("retina", eyepacs_tree(tmp_path / "eyes"), tmp_path / "out", "--task", "grade")
    assert data.task == "ordinal" and data.labels.max() == 4


def test_of_a_publishers_set_the_part_that_is_there_is_taken_when_asked_and_counted(tmp_path):
    tree = eyepacs_tree(tmp_path / "eyes")
    for name in ("3_left", "4_left", "4_right"):
        (tree / "train" / f"{name}.jpeg").unlink()
    message = fails("retina", tree, tmp_path / "out")
    assert "3_left.jpeg does not exist: 3 of 48" in message and "--available" in message
    data, text = prepare("retina", tree, tmp_path / "out", "--available")
    counts = {"there": 45, "of": 48, "patients_lost_some": 1, "patients_lost_all": 1}
    assert len(data.images) == 45 and data.card["report"]["listed"] == counts
    assert "there 45, of 48, patients lost some 1, patients lost all 1" in text
    for path in (tree / "train").iterdir():
        path.unlink()
    message = fails("retina", tree, tmp_path / "none", "--available")
    assert "48 of 48" in message and message.endswith("Complete the source")


def test_nih_without_some_of_its_archives_keeps_the_split_of_the_rest(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 41))
    whole, _ = prepare("nih", tree, tmp_path / "whole")
    for name in ("00000001_000", "00000001_001", "00000002_001"):
        (tree / "images_001/images" / f"{name}.png").unlink()
    data, text = prepare("nih", tree, tmp_path / "out", "--available")
    assert "there 77, of 80, patients lost some 1, patients lost all 1" in text
    assert np.array_equal(data.split, whole.split[[2, *range(4, 80)]])


def test_breast_says_what_part_of_the_publishers_patches_is_there(breast, tmp_path):
    data, text = prepare("breast_histology", breast, tmp_path / "out", "--available")
    assert "there 60, of 277524, patients lost all 264" in text


@pytest.mark.parametrize("name, table", [("nih", "Data_Entry_2017.csv"), ("retina", "trainLabels.csv")])
def test_a_wrong_folder_is_a_line_that_names_what_it_should_hold(tmp_path, name, table):
    (tmp_path / "photos").mkdir()
    message = fails(name, tmp_path / "photos", tmp_path / "out")
    assert table in message and "pass the folder" in message and "Errno" not in message


def test_retina_severe_is_judged_among_the_diseased_and_grade_0_is_for_pretraining(tmp_path):
    tree = eyepacs_tree(tmp_path / "eyes")
    data, text = prepare("retina", tree, tmp_path / "out", "--task", "severe")
    grades, judged = np.load(tmp_path / "out/retina/grades.npy"), data.rows("train", "val", "test")
    assert np.array_equal(data.labels[judged], grades[judged] >= 3) and grades[judged].min() == 1
    assert not grades[data.rows("unlabelled")].any() and len(data.rows("unlabelled")) == 10
    assert "unlabelled: 5 patients, images 10" in text


def test_retina_a_healthy_eye_of_a_judged_patient_is_left_out(tmp_path):
    tree = eyepacs_tree(tmp_path / "eyes")
    table = tree / "trainLabels.csv"
    table.write_text(table.read_text().replace("_left,3", "_left,0"))
    data, text = prepare("retina", tree, tmp_path / "out", "--task", "severe")
    held_out = set(data.patients[data.rows("val", "test")])
    lost = [patient for patient in held_out if (data.patients == patient).sum() == 1]
    assert lost and f"patients in val or test: {len(lost)}" in text
    assert not held_out & set(data.patients[data.pretraining_rows()])


@pytest.mark.parametrize("cell", ["", "-1", "7", "two", "1.5"])
def test_retina_a_grade_that_is_none_is_an_error_and_2_point_0_is_two(tmp_path, cell):
    tree = eyepacs_tree(tmp_path / "eyes")
    table = tree / "trainLabels.csv"
    right = table.read_text()
    table.write_text(right.replace("0_left,0", f"0_left,{cell}", 1))
    message = fails("retina", tree, tmp_path / "out")
    assert "trainLabels.csv: 0_left has the grade" in message and repr(cell) in message
    table.write_text(right.replace(",2", ",2.0"))
    prepare("retina", tree, tmp_path / "out", "--task", "grade")
    assert (np.load(tmp_path / "out/retina/grades.npy") == 2).sum() == 10


def aptos_tree(root, count=30):
    """The publisher's layout; the last picture is the first saved again with some noise, graded otherwise."""

    def drawn():
        """A disc with patches: noise alone has no brighter side that a second saving would keep."""
        picture, patches = fundus().astype(int), np.kron(RNG.integers(-50, 51, (6, 8, 1)), np.ones((20, 20, 1), int))
        return np.where(picture > 30, picture + patches, picture).clip(0, 255).astype(np.uint8)

    first = drawn()
    again = (first.astype(int) + RNG.integers(-1, 2, first.shape)).clip(0, 255).astype(np.uint8)
    for number in range(count):
        save(root / "train_images" / f"{number:012x}.png", {0: first, count - 1: again}.get(number, drawn()))
    lines = [f"{number:012x},{number % 5}" for number in range(count)]
    (root / "train.csv").write_text("\n".join(["id_code,diagnosis", *lines]) + "\n")
    return root


def test_aptos_near_equal_pictures_are_one_patient(tmp_path):
    data, text = prepare("retina", aptos_tree(tmp_path / "aptos"), tmp_path / "out", "--task", "grade")
    assert data.patients[0] == data.patients[29] and len(set(data.patients)) == 29
    assert "1 images are near-equal" in text and data.labels.tolist() == [number % 5 for number in range(30)]
    assert data.card["source"] == "Kaggle competition aptos2019-blindness-detection"


def test_aptos_groups_that_are_given_are_the_patients(tmp_path):
    tree = aptos_tree(tmp_path / "aptos")
    lines = [f"{number:012x},{number // 3:012x}" for number in range(30)]
    (tree / "groups.csv").write_text("\n".join(["id_code,group", *lines]))
    data, _ = prepare("retina", tree, tmp_path / "out", "--task", "grade")
    assert np.unique(data.patients, return_counts=True)[1].tolist() == [3] * 10


def odir_tree(root, patients=24):
    """The publisher's layout: the columns N to O hold what either eye has."""
    lines = ["ID,Patient Age,N,D,G,C,A,H,M,O,labels,target,filename"]
    for patient in range(patients):
        for side, letter in (("left", "N"), ("right", "NDGCAHMO"[patient % 8])):
            save(root / "preprocessed_images" / f"{patient}_{side}.jpg", fundus())
            lines.append(f"{patient},60,0,1,0,0,0,0,0,0,['{letter}'],\"[0]\",{patient}_{side}.jpg")
    (root / "full_df.csv").write_text("\n".join(lines) + "\n")
    return root


def test_odir_labels_are_those_of_the_eye_and_both_eyes_are_one_patient(tmp_path):
    tree = odir_tree(tmp_path / "odir")
    data, _ = prepare("retina", tree, tmp_path / "out")
    assert data.task == "multiclass" and np.bincount(data.labels).tolist() == [27, *[3] * 7]
    assert_split_by_patient(data)
    assert "use classes" in fails("retina", tree, tmp_path / "none", "--task", "grade")


def test_retinal_sources_are_pooled_as_unlabelled_rows_with_patients_apart_and_no_copy_of_a_judged_picture(tmp_path):
    main, more, eyes = (
        aptos_tree(tmp_path / "aptos"),
        odir_tree(tmp_path / "odir", 8),
        eyepacs_tree(tmp_path / "eyes", 8),
    )
    alone, _ = prepare("retina", main, tmp_path / "alone")
    copied = main / "train_images" / f"{alone.rows('test')[0]:012x}.png"
    (more / "preprocessed_images/0_left.jpg").write_bytes(copied.read_bytes())
    data, text = prepare("retina", main, tmp_path / "out", "--unlabelled", more, eyes)
    assert np.array_equal(data.labels[:30], alone.labels) and np.array_equal(data.split[:30], alone.split)
    names = set(data.patients[data.rows("unlabelled")])
    assert len(data.rows("unlabelled")) == 31 and {"odir/1", "eyepacs/1"} <= names and "1" not in names
    assert "ODIR" not in data.card["title"] and "odir5k" in data.card["source"] and "1 copies of pictures" in text


def test_a_second_source_of_the_same_layout_gives_nothing_of_patients_who_are_judged(tmp_path):
    main, more = eyepacs_tree(tmp_path / "eyes", 24), eyepacs_tree(tmp_path / "more", 30)
    data, text = prepare("retina", main, tmp_path / "out", "--unlabelled", more)
    held_out = set(data.patients[data.rows("val", "test")])
    assert held_out and not held_out & set(data.patients[data.pretraining_rows()])
    assert len(data.rows("unlabelled")) == 2 * (30 - len(held_out))


def test_retina_a_path_that_leaves_the_folder_is_refused(tmp_path):
    tree = eyepacs_tree(tmp_path / "eyes", 4)
    with open(tree / "trainLabels.csv", "a") as file:
        file.write("../../secret,1\n")
    assert "leads out of" in fails("retina", tree, tmp_path / "out")


def test_idrid_parts_keep_their_split_and_a_picture_in_both_stays_in_test(tmp_path):
    root = tmp_path / "idrid"
    shared, twin = fundus(), None
    for part, count in (("train", 30), ("test", 8)):
        lines = ["Image name,Retinopathy grade,Risk of macular edema "]
        for number in range(1, count + 1):
            lines.append(f"IDRiD_{number:03d},{number % 5},0")
            # Lossless pixels under the publisher's name, so that the copy is exact.
            pixels = shared if (part, number) in (("train", 3), ("test", 5)) else fundus()
            twin = pixels if (part, number) == ("train", 6) else twin
            pixels = twin if (part, number) == ("train", 7) else pixels
            path = root / part / f"IDRiD_{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)
        (root / f"{part}_labels.csv").write_text("\n".join(lines) + "\n")
    data, _ = prepare("retina", root, tmp_path / "out")
    assert len(data.rows("test")) == 8 and len(data.rows("train", "val")) == 29
    assert len(set(data.patients)) == 36, "two equal pictures of one part are one patient"
    assert data.card["report"]["copies_left_out"] == 1


@pytest.fixture
def children(tmp_path):
    """Kermany's layout: a number is used for bacteria and for virus alike, and in both parts."""
    root = tmp_path / "kermany" / "chest_xray"
    for part, numbers in (("train", range(1, 31)), ("test", range(1, 9))):
        for number in numbers:
            for kind in ("bacteria", "virus"):
                save(root / part / "PNEUMONIA" / f"person{number}_{kind}_{7 * number}.jpeg", noise(channels=1))
            save(root / part / "NORMAL" / f"IM-{number:04d}-0001.jpeg", noise(channels=1))
    return tmp_path / "kermany"


def test_kermany_normal_images_are_for_pretraining_and_the_publishers_test_part_is_kept(children, tmp_path):
    for path in (children / "chest_xray" / "test").rglob("person*.jpeg"):
        path.rename(path.with_suffix(".JPG"))
    data, _ = prepare("pneumonia", children, tmp_path / "out")
    assert_split_by_patient(data)
    assert data.classes == ["virus", "bacteria"] and len(data.rows("unlabelled")) == 38
    assert set(data.patients[data.rows("test")]) == {f"test/person{number}" for number in range(1, 9)}
    assert data.labels[data.rows("test")].mean() == 0.5, "bacteria and virus of a number are on one side"


def test_a_kermany_picture_in_both_parts_is_on_one_side_of_a_seeded_split(children, tmp_path):
    for number in range(1, 9):  # the same picture of a child of the test part, and of one of the training part
        folder = children / "chest_xray"
        path = folder / "test" / "PNEUMONIA" / f"person{number}_virus_{7 * number}.jpeg"
        shutil.copy(path, folder / "train" / "PNEUMONIA" / f"person9{number}_virus_1.jpeg")
    data, _ = prepare("pneumonia", children, tmp_path / "out", "--split", "seeded")
    assert_split_by_patient(data)
    same = np.unique(np.asarray(data.images).reshape(len(data.images), -1), axis=0, return_inverse=True)[1]
    twice = [np.flatnonzero(same == value) for value in np.flatnonzero(np.bincount(same) > 1)]
    assert len(twice) == 8 and all(len(set(data.patients[rows])) == 1 for rows in twice), "they are one patient"


def test_kermany_can_be_split_anew_and_be_asked_for_pneumonia(children, tmp_path):
    data, _ = prepare("pneumonia", children, tmp_path / "out", "--split", "seeded", "--seed", "3")
    assert_split_by_patient(data)
    assert {name.split("/")[0] for name in data.patients[data.rows("test")]} == {"train", "test"}
    easy, _ = prepare("pneumonia", children, tmp_path / "easy", "--task", "pneumonia")
    assert easy.classes == ["normal", "pneumonia"] and not len(easy.rows("unlabelled"))
    assert easy.labels.mean() == pytest.approx(2 / 3)


def littered(root):
    """What macOS and Synology put beside every file, and Jupyter into every folder it has shown."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        for name in (f"._{path.name}", f".ipynb_checkpoints/{path.name}", f"@eaDir/{path.name}"):
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_bytes(b"\0\5\26\7")
    return root


@pytest.mark.parametrize("name", ["pneumonia", "nih", "retina", "breast_histology"])
def test_hidden_files_change_nothing(name, children, breast, tmp_path):
    trees = {"pneumonia": lambda: children, "breast_histology": lambda: breast}
    trees |= {"nih": lambda: nih_tree(tmp_path / "n", range(1, 13)), "retina": lambda: aptos_tree(tmp_path / "aptos")}
    tree = trees[name]()
    before, _ = prepare(name, tree, tmp_path / "before")
    after, _ = prepare(name, littered(tree), tmp_path / "after")
    assert before.card["sha256"] == after.card["sha256"]


def test_archives_are_found_beside_hidden_files(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 13))
    whole, _ = prepare("nih", tree, tmp_path / "whole")
    with zipfile.ZipFile(tree / "images.zip", "w") as file:
        for path in sorted(tree.glob("images_001/images/*.png")):
            file.write(path, path.relative_to(tree))
    shutil.rmtree(tree / "images_001")
    data, _ = prepare("nih", littered(tree), tmp_path / "out")
    assert data.card["sha256"] == whole.card["sha256"]


def test_kermany_a_name_without_its_kind_is_named(children, tmp_path):
    save(children / "chest_xray" / "train" / "PNEUMONIA" / "person99.jpeg", noise(channels=1))
    assert "person99.jpeg" in fails("pneumonia", children, tmp_path / "out")


@pytest.fixture
def npz(tmp_path):
    arrays = {}
    for split, count in (("train", 40), ("val", 10), ("test", 12)):
        arrays[f"{split}_images"] = RNG.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    arrays["train_images"][7] = arrays["test_images"][3]
    arrays["train_images"][9] = arrays["train_images"][8]
    path = tmp_path / "pneumoniamnist.npz"
    np.savez(path, **arrays)
    return path


def test_medmnist_refuses_a_wrong_md5_unless_told_otherwise(npz, tmp_path):
    words = ("pneumoniamnist", "--source", npz, "--out", tmp_path / "out")
    done = run_script("medmnist_sets", *words)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert hashlib.md5(npz.read_bytes()).hexdigest() in done.stderr and "--allow-unverified" in done.stderr
    done = run_script("medmnist_sets", *words, "--allow-unverified")
    assert done.returncode == 0, done.stderr
    data = load("pneumoniamnist", tmp_path / "out", verify=True)
    assert data.card["verified"] is False and data.task == "binary"


@pytest.mark.parametrize("content", [b"notes", b"PK\x03\x04 broken", pickle.dumps([{}] * 9), b""])
def test_medmnist_a_damaged_or_foreign_file_is_one_line(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    words = ("pneumoniamnist", "--source", tmp_path / "own.npz", "--out", tmp_path / "out", "--allow-unverified")
    done = run_script("medmnist_sets", *words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "own.npz is damaged, or no .npz that holds train_images" in done.stderr


def test_medmnist_equal_pictures_never_stand_on_two_sides(npz, tmp_path):
    done = run_script(
        "medmnist_sets", "pneumoniamnist", "--source", npz, "--out", tmp_path / "out", "--allow-unverified"
    )
    assert done.returncode == 0, done.stderr
    data = load("pneumoniamnist", tmp_path / "out")
    assert len(data.rows("train")) == 39 and len(data.rows("test")) == 12
    assert data.card["report"]["copies_left_out"] == 1
    assert len(np.unique(data.patients)) == 39 - 1 + 10 + 12, "equal pictures count as one patient"


KAGGLEHUB = """
def dataset_download(name):
    assert name == "nih-chest-xrays/data"
    return TREE
def competition_download(name):
    raise ValueError("403 Forbidden: you need permission")
"""


def without_source(name, out, tree):
    """Run a script without --source, with a stand-in for kagglehub that knows one data set, and no network."""
    (out / "kagglehub.py").write_text(f"TREE = {str(tree)!r}\n{KAGGLEHUB}")
    command = [
        sys.executable,
        str(SCRIPTS / f"{name}.py"),
        "--out",
        str(out / "data"),
        "--side",
        "16",
        "--workers",
        "1",
    ]
    path = os.pathsep.join([str(out), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_without_a_source_the_publishers_files_are_downloaded(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 11))
    done = without_source("nih", tmp_path, tree)
    assert done.returncode == 0, done.stderr
    assert len(load("nih", tmp_path / "data").images) == 20


def test_a_download_that_fails_names_the_credentials_and_the_other_way(tmp_path):
    done = without_source("retina", tmp_path, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ("403 Forbidden", "kaggle.json", "--source PATH", "trainLabels.csv"))


def test_nih_official_lists_take_validation_out_of_training_by_patient(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 41))
    names = sorted(p.name for p in tree.glob("images_001/images/*.png"))
    (tree / "train_val_list.txt").write_text("\n".join(names[:64]))
    (tree / "test_list.txt").write_text("\n".join(names[64:]))
    data, _ = prepare("nih", tree, tmp_path / "out")
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [56, 8, 16]
    assert_split_by_patient(data)


def test_nih_a_picture_that_patients_share_is_in_one_split_only(tmp_path):
    tree = nih_tree(tmp_path / "nih", range(1, 21))
    files = sorted(tree.glob("images_001/images/*.png"))
    for file in files[10:40:2]:
        file.write_bytes(files[0].read_bytes())
    data, text = prepare("nih", tree, tmp_path / "out")
    report = data.card["report"]
    assert report["duplicate_images"] + report["copies_left_out"] == 15
    assert report["copies_left_out"] > 0 and f"{report['copies_left_out']} copies of pictures" in text
    assert "15 equal" not in text and "1 equal pictures have different labels" in text


@pytest.mark.parametrize(
    "name", ["breast_histology", "nih", "retina", "medmnist_sets", "phantoms", "folder", "pneumonia"]
)
def test_help_has_examples(name):
    done = subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"python data_scripts/{name}.py" in done.stdout


def test_the_real_nih_samples_keep_patients_apart(samples, tmp_path):
    data, _ = prepare("nih", samples / "nih64_sample", tmp_path, "--unlabelled", samples / "nih_sample")
    assert len(data.rows("train", "val", "test")) == 1000 and len(data.rows("unlabelled")) > 900
    assert_split_by_patient(data)
    held_out = set(data.patients[data.rows("val", "test")])
    assert not held_out & set(data.patients[data.pretraining_rows()])
    one, ten, everything = (set(label_subset(data, fraction, 0)) for fraction in (0.01, 0.1, 1.0))
    assert one <= ten < everything == set(data.rows("train"))


def test_phantom_subsets_are_nested_and_no_patient_is_on_two_sides(tmp_path):
    command = [sys.executable, str(SCRIPTS / "phantoms.py"), "--name", "retina_phantom", "--images", "300"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    data = load("retina_phantom", tmp_path)
    assert_split_by_patient(data)
    one, ten, everything = (set(label_subset(data, fraction, 0)) for fraction in (0.01, 0.1, 1.0))
    assert one < ten < everything == set(data.rows("train"))


def test_the_real_idrid_sample_has_no_picture_on_two_sides(samples, tmp_path):
    data, _ = prepare("retina", samples / "idrid_sample", tmp_path)
    assert data.card["report"]["copies_left_out"] >= 1
    assert len(data.rows("test")) == 103
