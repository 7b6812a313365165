"""Claims about the training loop: exact resume, one training per recipe, clear errors, honest rows."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mocolayers import pretrain as module
from mocolayers.errors import RunError
from mocolayers.pretrain import Trainer, learning_rate, pretrain, step_generator
from mocolayers.recipe import PRESETS, PRETRAINED_ARMS, preset
from mocolayers.runs import Run, find_runs

SMALL = {"batch": 16, "queue": 40, "log_every": 2, "monitor_every": 5, "steps": 12}

SCRIPT = """
import sys, torch
from mocolayers import pretrain as module
from mocolayers.datasets import load
from mocolayers.recipe import preset
torch.set_num_threads(1)
module.CHECKPOINT_SECONDS = 0
data = load("tiny", sys.argv[1])
recipe = preset("smoke", sys.argv[3], data, 1, batch=16, queue=40, log_every=2, monitor_every=5, steps=120)
module.pretrain(recipe, data, sys.argv[2], "cpu", progress=False)
"""


def start(data_folder, runs, arm):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(data_folder), str(runs), arm])


@pytest.mark.parametrize("arm", ["moco", "barlow-conditioned"])
def test_killed_and_resumed_ends_bit_identical(make_data, tmp_path, arm):
    data = make_data()
    recipe = preset("smoke", arm, data, 1, **SMALL | {"steps": 120})
    killed = Run(recipe, tmp_path / "killed")
    process = start(tmp_path / "data", tmp_path / "killed", arm)
    while not killed.checkpoint_file.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.finished, "it was killed in the middle"
    step = torch.load(killed.checkpoint_file, weights_only=True)["step"]
    assert 0 < step < recipe.steps
    for runs in ("killed", "straight"):
        assert start(tmp_path / "data", tmp_path / runs, arm).wait() == 0
    straight = Run(recipe, tmp_path / "straight")
    for a, b in zip(*(load_file(run.encoder_file).items() for run in (killed, straight)), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    pd.testing.assert_frame_equal(killed.history(), straight.history())


def test_pausing_leaves_a_run_to_resume(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL)
    paused = pretrain(recipe, data, tmp_path / "a", progress=False, after_step=lambda trainer: trainer.step == 5)
    assert not paused.finished and len(paused.history()) > 0
    resumed = pretrain(recipe, data, tmp_path / "a", progress=False)
    straight = pretrain(recipe, data, tmp_path / "b", progress=False)
    for name, value in load_file(resumed.encoder_file).items():
        assert torch.equal(value, load_file(straight.encoder_file)[name])


def test_the_same_recipe_never_trains_twice(make_data, tmp_path, monkeypatch):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    pretrain(recipe, data, tmp_path, progress=False)
    monkeypatch.setattr(module, "Trainer", None)
    assert pretrain(recipe, data, tmp_path, progress=False).finished
    table = find_runs(tmp_path)
    assert list(table["key"]) == [recipe.key] and table["finished"].all()


@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_every_arm_trains_and_is_watched(make_data, tmp_path, arm):
    data = make_data(channels=3)
    history = pretrain(preset("smoke", arm, data, **SMALL), data, tmp_path, progress=False).history()
    wanted = {"loss", "info_nce", "contrastive_accuracy", "embedding_std", "effective_rank", "knn_auc", "stage1_mse"}
    wanted |= {"stage4_scale_free", "stage4_norm", "stage4_diagonal", "stage4_off_diagonal"}
    if arm != "moco":
        wanted |= {"stage1", "stage4", "gradient_info_nce", "gradient_stage4"}
        shares = history.filter(like="gradient_").dropna()
        assert np.allclose(shares.sum(axis=1), 1)
    assert wanted <= set(history)
    assert history["step"].iloc[-1] == SMALL["steps"] and history["loss"].notna().all()


def test_training_reads_no_validation_or_test_image_except_for_the_knn_monitor(make_data, tmp_path, monkeypatch):
    data = make_data()
    asked = []
    monkeypatch.setattr(
        Trainer, "_images", lambda self, rows, real=Trainer._images: asked.append(rows) or real(self, rows)
    )
    monkeypatch.setattr(module, "knn_monitor", lambda encode, data: 0.5)
    pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    assert set(np.concatenate(asked)) <= set(data.pretraining_rows())


def test_all_arms_of_a_seed_see_the_same_batches_and_views(make_data):
    data = make_data()
    seen = []
    for arm in ("moco", "barlow"):
        trainer = Trainer(preset("smoke", arm, data, 3, **SMALL), data, torch.device("cpu"))
        trainer.step = 4
        rows = trainer._batch_rows()
        seen.append((rows, trainer.views(trainer._images(rows), step_generator(3, 4))))
    assert np.array_equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1][0], seen[1][1][0]) and torch.equal(seen[0][1][1], seen[1][1][1])


def test_an_epoch_visits_every_image_once(make_data):
    data = make_data()
    trainer = Trainer(preset("smoke", "moco", data, **SMALL), data, torch.device("cpu"))
    rows = []
    for step in range(trainer.steps_per_epoch):
        trainer.step = step
        rows.append(trainer._batch_rows())
    rows = np.concatenate(rows)
    assert len(set(rows)) == len(rows) >= len(trainer.rows) - trainer.batch


@pytest.mark.parametrize("name", ["checkpoint.pt", "encoder.safetensors"])
def test_a_truncated_file_names_the_remedy_and_is_kept(make_data, tmp_path, name):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    run = pretrain(recipe, data, tmp_path, progress=False)
    path = run.folder / name
    path.write_bytes(path.read_bytes()[:1000])
    if name == "checkpoint.pt":
        run.encoder_file.unlink()
    with pytest.raises(RunError, match=f"{name}.*rm ") as caught:
        pretrain(recipe, data, tmp_path, progress=False).load_encoder()
    assert path.stat().st_size == 1000 and "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_refused(make_data, tmp_path):
    data = make_data()
    run = Run(preset("smoke", "moco", data, **SMALL), tmp_path)
    run.open()
    torch.save({"something": 1}, run.checkpoint_file)
    with pytest.raises(RunError, match="not a checkpoint"):
        pretrain(run.recipe, data, tmp_path, progress=False)


def test_other_data_than_the_recipes_is_refused(make_data, tmp_path):
    recipe = preset("smoke", "moco", make_data("a"), **SMALL)
    with pytest.raises(RunError, match="make the recipe again"):
        pretrain(recipe, make_data("b", seed=5), tmp_path, progress=False)


def test_a_diverging_loss_is_an_error_and_no_encoder_is_written(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL | {"lr": 1e12, "log_every": 1})
    with pytest.raises(RunError, match="lower lr"):
        pretrain(recipe, data, tmp_path, progress=False)
    assert not Run(recipe, tmp_path).finished


def test_a_random_encoder_has_batch_norm_statistics_of_the_images(make_data, tmp_path):
    data = make_data()
    encoder = pretrain(preset("smoke", "random", data), data, tmp_path, progress=False).load_encoder()
    assert encoder.bn1.running_mean.abs().sum() > 0


def test_the_cosine_goes_from_the_rate_to_zero(make_data):
    recipe = preset("lesson", "moco", make_data())
    assert learning_rate(recipe, 0) == recipe.lr
    assert learning_rate(recipe, recipe.steps // 2) == pytest.approx(recipe.lr / 2)
    assert learning_rate(recipe, recipe.steps) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipes_key_changes_with_every_field(make_data, name):
    data = make_data()
    recipe = preset(name, "moco", data)
    assert recipe.key == preset(name, "moco", data).key
    changed = [preset(name, "moco", data, **{field: 7}).key for field in ("queue", "lr", "batch", "dim", "temperature")]
    changed += [preset(name, arm, data).key for arm in ("mse", "barlow", "random")] + [
        preset(name, "moco", data, 1).key
    ]
    assert len({recipe.key, *changed}) == len(changed) + 1


@pytest.mark.parametrize("wrong", [{"name": "huge"}, {"arm": "simclr"}, {"learning_rate": 1}])
def test_an_unknown_preset_arm_or_field_lists_the_known_ones(make_data, wrong):
    with pytest.raises(ValueError, match="moco|lesson|temperature"):
        preset(**{"name": "smoke", "arm": "moco", "data": make_data()} | wrong)


def test_the_paper_preset_is_the_released_recipe(make_data):
    data = make_data(channels=3)
    recipe = preset("paper", "barlow", data)
    got = (recipe.layout, recipe.width, recipe.head, recipe.queue, recipe.momentum, recipe.temperature, recipe.lr)
    assert got == ("resnet50", 64, "linear", 65_536, 0.999, 0.07, 0.03)
    assert (recipe.weight_decay, recipe.schedule, recipe.batch, recipe.bn_splits) == (1e-4, "constant", 32, 1)
    assert (recipe.projector, recipe.stage_weights, recipe.scale) == (2048, (5e-5,) * 4, 1 / 32)
    mse = preset("paper", "mse", data)
    assert (mse.pool, mse.stage_weights, mse.scale_free) == ((16, 16, 4, 4), (0.25,) * 4, False)


def test_a_gpu_that_is_not_there_is_a_clear_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RunError, match="--device cpu"):
        module.resolve_device("cuda")
