"""The synthetic data sets: repeatable, split by patient, not solved by simple means, and as hard as the dial says."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mocolayers.data.prepared import SCRIPTS, TEST, TRAIN, VAL, load

sys.path.insert(0, str(SCRIPTS))
import phantoms  # noqa: E402

NAMES = list(phantoms.PHANTOMS)
ILL = {"chest_phantom": 1, "histology_phantom": 1, "retina_phantom": 3}
each_phantom = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def drawn() -> dict:
    """260 images of each kind at 32 px."""
    return {name: phantoms.make(name, images=260, side=32)[0] for name in NAMES}


def linear_auc(features: np.ndarray, arrays: dict) -> float:
    train, test = (np.flatnonzero(arrays["split"] == code) for code in (TRAIN, TEST))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    model.fit(features[train], arrays["labels"][train])
    return roc_auc_score(arrays["labels"][test], model.predict_proba(features[test])[:, 1])


@each_phantom
def test_the_same_seed_draws_identical_bytes_however_many_are_drawn(name, drawn):
    again, _ = phantoms.make(name, images=60, side=32)
    for key in ("images", "labels", "patients"):
        assert again[key].tobytes() == drawn[name][key][:60].tobytes()


@each_phantom
def test_another_seed_draws_other_images(name, drawn):
    other, _ = phantoms.make(name, images=60, seed=1, side=32)
    assert not (other["images"] == drawn[name]["images"][:60]).all(axis=(1, 2, 3)).any()


@each_phantom
def test_no_patient_stands_in_two_splits(name, drawn):
    patients = [set(drawn[name]["patients"][drawn[name]["split"] == code]) for code in (TRAIN, VAL, TEST)]
    assert sum(map(len, patients)) == len(set.union(*patients))
    assert len(drawn[name]["images"]) > len(set.union(*patients))


@each_phantom
def test_the_default_size_has_the_promised_split_and_class_balance(name):
    patients, _, findings = map(np.array, zip(*phantoms._plan(name, phantoms.IMAGES, seed=0), strict=True))
    positive = findings >= ILL[name] - (name == "retina_phantom")
    split = np.digitize((patients + 0.5) / (patients.max() + 1), phantoms.ENDS)  # as `make` does
    for code, images in ((TRAIN, 3000), (VAL, 400), (TEST, 1000)):
        assert (split == code).sum() == pytest.approx(images, abs=40)
        assert 0.33 < positive[split == code].mean() < 0.52


@each_phantom
def test_neither_pixels_nor_colour_statistics_solve_it(name, drawn):
    pixels = drawn[name]["images"] / 255.0
    colour = np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))], axis=1)
    assert linear_auc(pixels.reshape(len(pixels), -1), drawn[name]) < 0.85
    assert linear_auc(colour, drawn[name]) < 0.85


@each_phantom
def test_a_higher_difficulty_changes_fewer_and_fainter_pixels(name):
    def visible(difficulty: float) -> float:
        pairs = [
            [phantoms.draw(name, 0, patient, 0, finding, 32, difficulty).astype(float) for finding in (0, ILL[name])]
            for patient in range(20)
        ]
        return float(np.mean([np.abs(with_finding - without).mean() for without, with_finding in pairs]))

    easy, default, hard = visible(0), visible(0.5), visible(1)
    assert easy > 1.1 * default > 1.21 * hard > 0


@pytest.mark.parametrize("name", ["chest_phantom", "retina_phantom"])
def test_a_finding_leaves_the_rest_of_the_image_as_it_was(name):
    for patient in range(10):
        without, with_finding = (phantoms.draw(name, 0, patient, 0, finding) for finding in (0, ILL[name]))
        changed = (without != with_finding).any(axis=2)
        assert 0 < changed.mean() < 0.6
        assert not changed[[0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_a_chest_opacity_only_brightens():
    for patient in range(10):
        without, with_finding = (
            phantoms.draw("chest_phantom", 0, patient, 0, finding).astype(int) for finding in (0, 1)
        )
        assert (with_finding >= without - 1).all()


def test_more_severe_retinopathy_shows_more():
    def change(grade: int) -> float:
        pairs = ([phantoms.draw("retina_phantom", 0, p, 0, g).astype(float) for g in (0, grade)] for p in range(12))
        return float(np.mean([np.abs(ill - healthy).mean() for healthy, ill in pairs]))

    by_grade = [change(grade) for grade in range(5)]
    assert by_grade == sorted(by_grade) and by_grade[0] == 0


def test_referable_means_grade_two_and_both_eyes_share_a_patient(drawn):
    arrays = drawn["retina_phantom"]
    assert np.array_equal(arrays["labels"], (arrays["grades"] >= 2).astype(int))
    assert set(arrays["grades"]) == {0, 1, 2, 3, 4}
    assert set(np.unique(arrays["patients"], return_counts=True)[1]) == {2}


def test_the_optic_disc_lies_nasally_in_either_eye(drawn):
    green = drawn["retina_phantom"]["images"][..., 1].astype(float)
    right, left = green[0::2, 12:20].mean(axis=(0, 1)), green[1::2, 12:20].mean(axis=(0, 1))
    assert right[20:28].mean() > right[4:12].mean()
    assert left[4:12].mean() > left[20:28].mean()


@each_phantom
def test_films_of_one_patient_are_alike(name, drawn):
    """Images of one patient are nearer to each other than to a stranger's, yet never equal."""
    pixels = drawn[name]["images"].reshape(260, -1).astype(float)
    if name == "retina_phantom":
        pixels[1::2] = drawn[name]["images"][1::2, :, ::-1].reshape(130, -1)
    same = drawn[name]["patients"][:-1] == drawn[name]["patients"][1:]
    gap = np.abs(pixels[:-1] - pixels[1:]).mean(axis=1)
    assert gap[same].min() > 0 and gap[same].mean() < gap[~same].mean()


@each_phantom
def test_a_larger_side_shows_the_same_picture(name):
    for patient in range(3):
        small = phantoms.draw(name, 0, patient, 0, 1, side=32).astype(float)
        large = phantoms.draw(name, 0, patient, 0, 1, side=96).astype(float)
        large = large.reshape(32, 3, 32, 3, -1).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.93


def run_phantoms(*words):
    command = [sys.executable, str(SCRIPTS / "phantoms.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_writes_what_load_reads_and_calls_it_synthetic(tmp_path):
    assert run_phantoms("--out", tmp_path, "--images", "60", "--side", "16").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for name in NAMES:
        data = load(name, tmp_path, verify=True)
        assert "synthetic" in data.card["title"] and data.card["licence"] == "MIT"
        assert data.images.shape == (60, 16, 16, 1 if name == "chest_phantom" else 3)
        assert f"--name {name} --images 60 --side 16 --seed 0" in data.card["source"]


@pytest.mark.parametrize("wrong", [["--difficulty", "2"], ["--images", "3"], ["--side", "0"], ["--name", "brain"]])
def test_a_wrong_option_is_refused_with_a_message(wrong, tmp_path):
    done = run_phantoms("--out", tmp_path, *wrong)
    assert done.returncode and wrong[0] in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
