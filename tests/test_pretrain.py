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
import torchvision
from safetensors.torch import load_file

from mocolayers.recipe import PRESETS, PRETRAINED_ARMS, preset
from mocolayers.runtime import RunError, step_generator
from mocolayers.training import dry_run
from mocolayers.training import pretrain as module
from mocolayers.training.pretrain import Trainer, learning_rate, pretrain, stage_share
from mocolayers.training.runs import Run, initial_weights

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
    pretrain(recipe, data, tmp_path / "runs", progress=False)
    monkeypatch.setattr(module, "Trainer", None)
    assert pretrain(recipe, data, tmp_path / "runs", progress=False).finished
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [recipe.key]


@pytest.mark.parametrize("arm", ["random", "supervised"])
def test_an_arm_without_pretraining_stays_without_whatever_the_others_change(make_data, arm):
    data = make_data()
    assert preset("lesson", arm, data, steps=600).steps == 0
    assert preset("lesson", arm, data, steps=600).key == preset("lesson", arm, data).key


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


def test_training_reads_no_validation_or_test_image_except_for_the_knn_monitor(
    make_data, tmp_path, monkeypatch, watched
):
    data = make_data()
    asked = watched(data)
    monkeypatch.setattr(module, "knn_monitor", lambda encode, data: 0.5)
    pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    assert set(np.concatenate(asked)) <= set(data.pretraining_rows())


def test_all_arms_of_a_seed_see_the_same_batches_and_views(make_data):
    data = make_data()
    seen = []
    for arm in ("moco", "barlow"):
        trainer = Trainer(preset("smoke", arm, data, 3, **SMALL), data, torch.device("cpu"))
        trainer.step = 4
        rows = trainer.batch_rows(trainer.step)
        seen.append((rows, trainer.views(trainer._images(rows), step_generator(3, 4))))
    assert np.array_equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1][0], seen[1][1][0]) and torch.equal(seen[0][1][1], seen[1][1][1])


def test_an_epoch_visits_every_image_once(make_data):
    data = make_data()
    trainer = Trainer(preset("smoke", "moco", data, **SMALL), data, torch.device("cpu"))
    rows = []
    for step in range(trainer.steps_per_epoch):
        trainer.step = step
        rows.append(trainer.batch_rows(trainer.step))
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


def test_the_stage_losses_warm_up_to_their_weights(make_data):
    data = make_data()
    cold = preset("smoke", "mse", data, **SMALL, stage_warmup=0.5)
    warm = preset("smoke", "mse", data, **SMALL)
    assert [stage_share(cold, step) for step in (0, 3, 6, 11)] == [0, 0.5, 1, 1]
    assert stage_share(warm, 0) == 1
    cold, warm = (Trainer(recipe, data, torch.device("cpu")) for recipe in (cold, warm))
    first = [trainer.train_step().terms for trainer in (cold, warm)]
    assert first[0]["stage1"].item() == 0 < first[1]["stage1"].item()
    assert first[0]["info_nce"].item() == first[1]["info_nce"].item()


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_training_starts_from_given_weights(make_data, tmp_path, channels, prefix):
    theirs = torchvision.models.resnet18()
    path = tmp_path / "imagenet.pth"
    torch.save({prefix + name: value for name, value in theirs.state_dict().items()}, path)
    data = make_data(channels=channels)
    changes = {"layout": "resnet18", "width": 64, "stem": "imagenet", "init": initial_weights(path)[1]}
    recipe = preset("smoke", "moco", data, **changes)
    assert recipe.key != preset("smoke", "moco", data, **changes | {"init": ""}).key
    model = Trainer(recipe, data, torch.device("cpu"), path).model
    x = torch.rand(2, 1, 64, 64).expand(-1, 3, -1, -1)
    theirs.fc = torch.nn.Identity()
    for encoder in (model.encoder_q, model.encoder_k):
        with torch.no_grad():
            assert torch.allclose(encoder.eval()(x[:, :channels]).embedding, theirs.eval()(x), atol=1e-4)


def test_weights_that_do_not_fit_or_cannot_be_read_are_a_clear_error(make_data, tmp_path):
    data, path = make_data(), tmp_path / "imagenet.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    recipe = preset("smoke", "moco", data, init=initial_weights(path)[1])
    with pytest.raises(RunError, match="does not fit.*--set layout="):
        Trainer(recipe, data, torch.device("cpu"), path)
    with pytest.raises(RunError, match="--init PATH"):
        Trainer(recipe, data, torch.device("cpu"))
    path.write_bytes(b"not weights")
    with pytest.raises(RunError, match="state dict"):
        initial_weights(path)


def test_fp16_scales_its_gradients_and_still_learns(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "mse", data, precision="fp16", **SMALL)
    trainer = Trainer(recipe, data, torch.device("cpu"))
    before = trainer.model.encoder_q.conv1.weight.clone()
    for _ in range(2):
        assert torch.isfinite(trainer.train_step().loss)
    assert trainer.state()["scaler"]["scale"] > 1
    assert not torch.equal(trainer.model.encoder_q.conv1.weight, before)


def test_the_sound_paper_preset_closes_the_leaks_of_the_released_one(make_data):
    data = make_data(n=600)
    released, sound = (preset(name, "mse", data) for name in ("paper", "paper-sound"))
    images = len(data.pretraining_rows())
    assert released.bn_splits == 1 and sound.bn_splits == 2
    assert sound.batch / sound.bn_splits >= 16
    assert released.queue > images and sound.queue <= images / 4
    assert (sound.layout, sound.temperature, sound.stage_weights) == (
        released.layout,
        released.temperature,
        released.stage_weights,
    )


def test_a_dry_run_measures_and_writes_nothing(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "barlow", data)
    tried = dry_run.try_steps(recipe, data, "cpu")
    assert tried.batch == recipe.batch and 0 < tried.seconds < 60 and tried.peak > 10**7
    text = dry_run.describe(recipe, data, tried, "smoke")
    assert f"batch {recipe.batch}" in text and "images/s" in text and "whole run" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_takes_the_largest_batch_that_fits(make_data, monkeypatch):
    data = make_data()
    recipe = preset("paper-sound", "moco", data, layout="resnet10", width=8)
    used = []
    monkeypatch.setattr(dry_run, "_free", lambda device: 1000)
    # A made-up machine on which a step takes 100 bytes, and 50 more for every image.
    monkeypatch.setattr(
        dry_run, "_measure", lambda trainer, steps: (used.append(trainer.batch) or 1.0, 100 + 50 * trainer.batch)
    )
    tried = dry_run.try_steps(recipe, data, "cpu")
    assert tried.batch == used[-1] == 14, "800 bytes are 80% of what is free"
    assert "batch 32 would not fit" in dry_run.describe(recipe, data, tried, "paper-sound")
