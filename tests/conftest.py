"""Tiny synthetic data sets in the prepared format, and where real samples are looked for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mocolayers.data.prepared import load, save_prepared
from mocolayers.notebook.series import HOME, executed
from mocolayers.recipe import ARMS, preset
from mocolayers.runtime import held
from mocolayers.training.pretrain import pretrain

# Threads wait for one another by spinning: processes that share cores take many times as long with two each.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
CARD = {"title": "Tiny (synthetic)", "source": "made by the tests", "licence": "none", "citation": ""}


def make_arrays(n=240, side=16, channels=1, task="binary", per_patient=3, seed=0):
    """Noise with a bright square where the label is positive."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (n, side, side, channels)).astype(np.uint8)
    patients = np.repeat(np.arange(-(-n // per_patient)), per_patient)[:n]
    labels = rng.integers(0, {"binary": 2, "ordinal": 4, "multiclass": 3}.get(task, 2), n)
    if task == "multilabel":
        labels = (rng.random((n, 3)) < (0.5, 0.3, 0.1)).astype(np.uint8)
    images[(labels if labels.ndim == 1 else labels[:, 0]) > 0, 4:9, 4:9] += 100
    split = np.array([0, 0, 0, 1, 2], np.uint8)[patients % 5]
    return {"images": images, "labels": labels, "patients": patients, "split": split}


def make_card(task="binary", channels=1):
    classes = {"binary": 2, "ordinal": 4, "multiclass": 3, "multilabel": 3}[task]
    modality = "chest" if channels == 1 else "histology"
    return CARD | {"task": task, "modality": modality, "classes": [f"class {c}" for c in range(classes)]}


@pytest.fixture(autouse=True)
def arms_as_they_were():
    """What a test adds to the arms is gone after it."""
    before = dict(ARMS)
    yield
    ARMS.clear()
    ARMS.update(before)


@pytest.fixture
def make_data(tmp_path):
    """A function that writes and loads a tiny data set: make_data(task="multilabel", channels=3)."""

    def make(name="tiny", **options):
        card = make_card(options.get("task", "binary"), options.get("channels", 1))
        shutil.rmtree(tmp_path / "data" / name, ignore_errors=True)  # what is there is never replaced
        save_prepared(tmp_path / "data" / name, make_arrays(**options), card)
        return load(name, tmp_path / "data")

    return make


@pytest.fixture
def pretrained(make_data, tmp_path):
    """A function that gives a data set and a finished tiny run of an arm on it."""

    def make(arm="moco", **options):
        data = make_data(**options)
        recipe = preset("smoke", arm, data, batch=16, queue=40, steps=4)
        return data, pretrain(recipe, data, tmp_path / "runs", progress=False)

    return make


@pytest.fixture
def watched():
    """A function that makes a data set remember which rows of its images were read, and returns where."""

    class Watched:
        def __init__(self, images):
            self.images, self.asked = images, []
            self.shape, self.dtype, self.ndim = images.shape, images.dtype, images.ndim

        def __getitem__(self, rows):
            self.asked.append(rows)
            return self.images[rows]

    def watch(data):
        object.__setattr__(data, "images", Watched(data.images))
        return data.images.asked

    return watch


@pytest.fixture
def samples():
    """The folder of real samples, or a skip that says what is missing."""
    place = Path(os.environ.get("MOCOLAYERS_SAMPLES", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"no real samples at {place}; set MOCOLAYERS_SAMPLES to run this test")
    return place


@pytest.fixture(scope="session")
def smoke_series(tmp_path_factory, worker_id):
    """The whole series at smoke on the synthetic chest phantom: its rows by notebook, and the folder they are in."""
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "series"  # of all processes that run the tests
    place.mkdir(exist_ok=True)
    with held(place):
        if not (place / "rows.json").is_file():
            rows = executed(["chest_phantom"], ["smoke"], [0], (), place / "runs", place / "executed")
            (place / "rows.json").write_text(json.dumps({row["notebook"]: row for row in rows}, default=str))
    return json.loads((place / "rows.json").read_text()), place


def run_make(target, variable):
    """`make TARGET VARIABLE` of this checkout, with the Python that runs the tests."""
    command = ["make", target, variable, f"PY={sys.executable}", "READY="]
    return subprocess.run(command, cwd=HOME, capture_output=True, text=True)
