"""Claims about the training loop: exact resume, one training per recipe, nothing lost, clear errors, honest rows."""

import contextlib
import functools
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocolayers.data.views import to_float, two_views
from mocolayers.recipe import ARMS, PRETRAINED_ARMS, preset
from mocolayers.runtime import RunError, step_generator
from mocolayers.training import pretrain as module
from mocolayers.training.monitors import knn_monitor
from mocolayers.training.pretrain import Trainer, learning_rate, pretrain
from mocolayers.training.runs import (
    Run,
    about_weights,
    initial_weights,
    read_kept,
    save_kept,
    save_weights,
    transform,
    write_file,
)

CPU = torch.device("cpu")
SMALL = {"batch": 16, "queue": 40, "log_every": 2, "monitor_every": 5, "steps": 12}
LONG = SMALL | {"steps": 60}

SCRIPT = """
import signal, sys, time, torch
from mocolayers.data.prepared import load
from mocolayers.recipe import preset
from mocolayers.training.pretrain import pretrain
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
def after_step(trainer):
    print(trainer.step, flush=True)
    time.sleep(0.2 if trainer.step < 5 else 0)
data = load("tiny", sys.argv[1])
recipe = preset("smoke", sys.argv[3], data, 1, batch=16, queue=40, log_every=2, monitor_every=5, steps=60)
pretrain(recipe, data, sys.argv[2], "cpu", progress=False, after_step=after_step)
"""


def start(data_folder, runs, arm):
    words = [sys.executable, "-c", SCRIPT, str(data_folder), str(runs), arm]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same_weights(one, two):
    one, two = (load_file(run.encoder_file) for run in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how, arm", [("SIGKILL", "barlow-conditioned"), ("SIGTERM", "moco"), ("SIGINT", "mse")])
def test_killed_and_resumed_ends_bit_identical(make_data, tmp_path, how, arm):
    data = make_data()
    recipe = preset("smoke", arm, data, 1, **LONG)
    killed, straight = (Run(recipe, tmp_path / name) for name in ("killed", "straight"))
    process = start(tmp_path / "data", tmp_path / "killed", arm)
    while int(process.stdout.readline()) < 15:
        assert process.poll() is None
    process.send_signal(getattr(signal, how))
    process.communicate()
    assert process.returncode != 0 and not killed.finished
    assert torch.load(killed.checkpoint_file, weights_only=True)["step"] % 6 == 0
    for run in (killed, straight):
        pretrain(recipe, data, run.folder.parent, "cpu", progress=False)
    assert same_weights(killed, straight)
    pd.testing.assert_frame_equal(killed.history(), straight.history())


def test_pausing_leaves_a_run_to_resume(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL)
    paused = pretrain(recipe, data, tmp_path / "a", progress=False, after_step=lambda trainer: trainer.step == 5)
    assert not paused.finished and len(paused.history()) > 0
    resumed = pretrain(recipe, data, tmp_path / "a", progress=False)
    assert same_weights(resumed, pretrain(recipe, data, tmp_path / "b", progress=False))


def test_the_same_recipe_never_trains_twice(make_data, tmp_path, monkeypatch):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    pretrain(recipe, data, tmp_path / "runs", progress=False)
    monkeypatch.setattr(module, "Trainer", None)
    assert pretrain(recipe, data, tmp_path / "runs", progress=False).finished
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [recipe.key]


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


def test_a_collapsed_network_finds_no_own_key(make_data):
    data = make_data()
    trainer = Trainer(preset("smoke", "moco", data, **SMALL | {"log_every": 1}), data, CPU)
    with torch.no_grad():
        for head in (trainer.model.head_q, trainer.model.head_k):
            head[2].weight.zero_()
            head[2].bias.fill_(1.0)
    for _ in range(2):
        trainer.train_step()
    assert trainer.history[1]["contrastive_accuracy"] == 0, "every key of the queue is as near as the own one"


def test_training_reads_no_validation_or_test_image_except_for_the_knn_monitor(
    make_data, tmp_path, monkeypatch, watched
):
    data = make_data()
    asked = watched(data)
    monkeypatch.setattr(module, "knn_monitor", lambda encoder, data: 0.5)
    pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    assert set(np.concatenate(asked)) <= set(data.pretraining_rows())


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal"])
def test_the_knn_monitor_reads_training_and_validation_images_only(make_data, watched, task):
    data = make_data(n=300, task=task)
    encoder = Trainer(preset("smoke", "moco", data), data, CPU).model.encoder_q
    asked = watched(data)
    auc = knn_monitor(encoder, data, most=100)
    assert set(np.concatenate(asked)) <= set(data.rows("train", "val")) and len(asked) > 1
    assert 0.5 < auc <= 1, "the bright square is easy to see"
    assert knn_monitor(encoder, data, most=100) == auc


def test_all_arms_of_a_seed_see_the_same_batches_and_views(make_data):
    data = make_data()
    seen = []
    for arm in ("moco", "barlow"):
        trainer = Trainer(preset("smoke", arm, data, 3, **SMALL), data, CPU)
        rows = trainer.batch_rows(4)
        seen.append((rows, *two_views(torch.from_numpy(data.images[rows]), trainer.recipe.views, step_generator(3, 4))))
    assert all(np.array_equal(one, two) for one, two in zip(*seen, strict=True))


def test_an_epoch_visits_every_image_once_and_a_steps_rows_depend_on_the_step_alone(make_data):
    data = make_data()
    trainer, other = (Trainer(preset("smoke", "moco", data, **SMALL), data, CPU) for _ in range(2))
    rows = [trainer.batch_rows(step) for step in range(3 * trainer.steps_per_epoch)]
    epoch = np.concatenate(rows[: trainer.steps_per_epoch])
    assert len(set(epoch)) == len(epoch) > len(trainer.rows) - trainer.batch
    backwards = [other.batch_rows(step) for step in reversed(range(len(rows)))][::-1]
    assert np.array_equal(rows, backwards)


@pytest.mark.parametrize("arm", ["random", "supervised", "moco", "mse"])
def test_batch_norm_statistics_of_every_arm_are_those_of_the_same_clean_images(make_data, tmp_path, arm):
    data = make_data()
    encoder = pretrain(preset("smoke", arm, data, **SMALL), data, tmp_path, progress=False).load_encoder()
    with torch.no_grad():
        first = encoder.conv1(to_float(torch.from_numpy(data.images[data.pretraining_rows()])))
    assert torch.allclose(encoder.bn1.running_mean, first.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)


def bad_in_the_middle(monkeypatch, bad_step):
    """A `Trainer` whose weights are ruined before a step, as by a gradient that is too large."""

    class Ruined(Trainer):
        def train_step(self):
            if self.step == bad_step:
                self.model.encoder_q.conv1.weight.data[0] = float("nan")
            return super().train_step()

    monkeypatch.setattr(module, "Trainer", Ruined)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(make_data, tmp_path, monkeypatch, log_every):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL | {"log_every": log_every, "monitor_every": 1000})
    run = Run(recipe, tmp_path / "a")
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patched:
        bad_in_the_middle(patched, 7)
        with pytest.raises(RunError, match="mse.*lower lr"):
            pretrain(recipe, data, tmp_path / "a", progress=False)
    assert run.checkpoint()["step"] == 7 and not run.finished
    resumed = pretrain(recipe, data, tmp_path / "a", progress=False)
    assert same_weights(resumed, pretrain(recipe, data, tmp_path / "b", progress=False))


def test_a_loss_that_is_not_finite_is_noted_even_if_all_weights_still_are(make_data):
    data = make_data()
    trainer = Trainer(preset("smoke", "moco", data, **SMALL | {"log_every": 100}), data, CPU)
    trainer.train_step()
    trainer.check_finite()
    trainer.optimiser.step = lambda *_: None
    trainer.model.temperature = float("nan")
    trainer.train_step()
    trainer.model.temperature = 0.1
    assert torch.isfinite(trainer.train_step().loss)
    with pytest.raises(RunError, match="after 3 steps"):
        trainer.check_finite()


def test_a_diverging_loss_is_an_error_and_no_encoder_is_written(make_data, tmp_path):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL | {"lr": 1e9})
    with pytest.raises(RunError, match="lower lr"):
        pretrain(recipe, data, tmp_path, progress=False)
    assert not Run(recipe, tmp_path).finished


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: torch.save({"something": 1}, path),
    "code": lambda path: torch.save({"recipe": subprocess.Popen}, path),
    "flipped": lambda path: flipped(path, path.stat().st_size // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["checkpoint.pt", "encoder.safetensors"])
def test_a_damaged_file_names_the_remedy_in_our_words_and_is_kept(make_data, tmp_path, name, damage):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    run = pretrain(recipe, data, tmp_path, progress=False)
    path = run.folder / name
    if name == "checkpoint.pt":
        run.encoder_file.unlink()
    DAMAGE[damage](path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=f"{name}.*rm ") as caught:
        pretrain(recipe, data, tmp_path, progress=False).load_encoder()
    assert path.read_bytes() == before
    assert not any(word in str(caught.value) for word in ("\n", "weights_only", "pickle"))


@pytest.mark.parametrize("part, value", [("optimiser", {}), ("step", "x"), ("model", [1]), ("history", 3)])
def test_a_part_of_a_checkpoint_that_does_not_fit_is_a_clear_error(make_data, tmp_path, part, value):
    data = make_data()
    run = pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    run.encoder_file.unlink()
    torch.save(run.checkpoint() | {part: value}, run.checkpoint_file)
    with pytest.raises(RunError, match="checkpoint.pt.*rm "):
        pretrain(run.recipe, data, tmp_path, progress=False)


def test_a_checkpoint_of_another_recipe_is_refused(make_data, tmp_path):
    data = make_data()
    theirs, ours = (Run(preset("smoke", "moco", data, **SMALL, lr=lr), tmp_path) for lr in (0.01, 0.02))
    pretrain(theirs.recipe, data, tmp_path, progress=False)
    shutil.copytree(theirs.folder, ours.folder, ignore=shutil.ignore_patterns("encoder*", "recipe*"))
    with pytest.raises(RunError, match=f"another recipe .{theirs.recipe.key}"):
        pretrain(ours.recipe, data, tmp_path, progress=False)


@pytest.mark.parametrize("damage", ["cut", "one bit", "type of the numbers"])
def test_a_finished_run_with_a_damaged_encoder_is_said_and_made_again_without_training(
    make_data, tmp_path, monkeypatch, damage
):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    run = pretrain(recipe, data, tmp_path, progress=False)
    good = run.encoder_file.read_bytes()
    bit, kind = good[:-1] + bytes([good[-1] ^ 1]), good.replace(b'"F32"', b'"I32"', 1)
    bad = {"cut": good[:100], "one bit": bit, "type of the numbers": kind}[damage]
    run.encoder_file.write_bytes(bad)
    monkeypatch.setattr(Trainer, "train_step", None)
    with pytest.raises(RunError, match="encoder.safetensors is damaged.*to make it again, remove it: rm"):
        pretrain(recipe, data, tmp_path, progress=False)
    assert run.encoder_file.read_bytes() == bad
    run.encoder_file.unlink()
    assert pretrain(recipe, data, tmp_path, progress=False).encoder_file.read_bytes() == good


@pytest.mark.parametrize("step", [-1, 13, 10**9, 3.5, "3", None])
def test_a_checkpoint_at_a_step_that_the_recipe_has_not_is_refused(make_data, tmp_path, step):
    data = make_data()
    recipe = preset("smoke", "moco", data, **SMALL)
    run = pretrain(recipe, data, tmp_path, progress=False, after_step=lambda trainer: trainer.step == 5)
    torch.save(torch.load(run.checkpoint_file, weights_only=True) | {"step": step}, run.checkpoint_file)
    with pytest.raises(RunError, match="checkpoint.pt is at step .* of 12.*remove it: rm"):
        pretrain(recipe, data, tmp_path, progress=False)
    assert not run.finished


def test_a_damaged_recipe_or_history_is_named_and_kept(make_data, tmp_path):
    data = make_data()
    run = pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    run.history_file.write_bytes(b"")
    with pytest.raises(RunError, match="history.csv"):
        run.history()
    run.encoder_file.unlink()
    recipe = run.folder / "recipe.json"
    recipe.write_text("{")
    with pytest.raises(RunError, match="recipe.json"):
        pretrain(run.recipe, data, tmp_path, progress=False)
    assert recipe.read_text() == "{"


def test_a_folder_that_cannot_be_written_is_one_line(make_data, tmp_path):
    data = make_data()
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="runs.*cannot be written") as caught:
        pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path / "runs", progress=False)
    assert "\n" not in str(caught.value)


def test_the_hash_of_the_weights_follows_the_file(make_data, tmp_path):
    data = make_data()
    one, two = (pretrain(preset("smoke", "random", data, seed), data, tmp_path, progress=False) for seed in (0, 1))
    before = one.weights_hash
    assert len(before) == 12 and before != two.weights_hash
    shutil.copyfile(two.encoder_file, one.encoder_file)
    assert one.weights_hash == two.weights_hash
    one.encoder_file.unlink()
    with pytest.raises(RunError, match="does not exist"):
        print(one.weights_hash)


def test_an_arm_without_training_has_an_empty_history(make_data, tmp_path):
    data = make_data()
    assert pretrain(preset("smoke", "random", data), data, tmp_path, progress=False).history().empty


def test_equal_weights_are_equal_files(make_data, tmp_path):
    data = make_data()
    run = pretrain(preset("smoke", "random", data), data, tmp_path, progress=False)
    for _ in range(3):
        save_weights(run.load_encoder(), tmp_path / "again.safetensors", run.recipe)
        assert (tmp_path / "again.safetensors").read_bytes() == run.encoder_file.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("save", [torch.save, lambda value, place: Path(place).write_bytes(bytes(value.nbytes))])
def test_a_full_disk_is_one_line_and_what_was_there_is_kept(tmp_path, save):
    path = tmp_path / "checkpoint.pt"
    path.write_text("the last good one")
    with pytest.raises(RunError, match="checkpoint.pt cannot be written.*the same command goes on") as caught:
        write_file(path, lambda _: save(torch.zeros(10**6), "/dev/full"))
    assert "\n" not in str(caught.value) and path.read_text() == "the last good one"
    with pytest.raises(RuntimeError, match="of our own"):
        write_file(path, lambda _: exec("raise RuntimeError('of our own')"))


def test_other_data_than_the_recipes_is_refused(make_data, tmp_path):
    recipe = preset("smoke", "moco", make_data("a"), **SMALL)
    with pytest.raises(RunError, match="make the recipe again"):
        pretrain(recipe, make_data("b", seed=5), tmp_path, progress=False)


def test_a_batch_norm_group_never_has_a_single_image(make_data):
    few, more = make_data("few", n=3), make_data("more", n=63)
    with pytest.raises(RunError, match="few has 3 images.*at least 4"):
        Trainer(preset("smoke", "moco", few), few, CPU)
    trainer = Trainer(preset("smoke", "moco", more, bn_splits=4, batch=64), more, CPU)
    assert trainer.batch == len(trainer.rows) // 4 * 4 < len(trainer.rows)
    assert torch.isfinite(trainer.train_step().loss)


def test_a_queue_that_is_long_for_the_images_is_said_once(make_data, tmp_path, capsys):
    data = make_data()
    for queue in (16, 40):
        for _ in range(2):
            pretrain(preset("smoke", "moco", data, **SMALL | {"queue": queue}), data, tmp_path)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["note"]


def test_the_cosine_goes_from_the_rate_to_zero(make_data):
    recipe = preset("lesson", "moco", make_data())
    assert learning_rate(recipe, 0) == recipe.lr
    assert learning_rate(recipe, recipe.steps // 2) == pytest.approx(recipe.lr / 2)
    assert learning_rate(recipe, recipe.steps) == pytest.approx(0, abs=1e-9)


def given(theirs, kind):
    """The files that people have of a torchvision ResNet."""
    named = {
        "torchvision": theirs,
        "DataParallel": {f"module.{name}": value for name, value in theirs.items()},
        "MoCo": {f"module.encoder_{k}.{name}": value * (k == "q") for k in "kq" for name, value in theirs.items()},
        "Lightning": {f"model.backbone.{name}": value for name, value in theirs.items()},
    }[kind]
    if kind in ("MoCo", "Lightning"):
        return {"epoch": 3, "state_dict": named | {"queue": torch.zeros(8, 8)}, "hyper_parameters": {"lr": 0.1}}
    return named


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["torchvision", "DataParallel", "MoCo", "Lightning"])
def test_training_starts_from_given_weights(make_data, tmp_path, capsys, channels, kind):
    theirs = torchvision.models.resnet18()
    path = tmp_path / "imagenet.pth"
    torch.save(given(theirs.state_dict(), kind), path)
    data = make_data(channels=channels)
    changes = {"layout": "resnet18", "width": 64, "stem": "imagenet", "init": initial_weights(path)[1]}
    recipe = preset("smoke", "moco", data, **changes)
    assert recipe.key != preset("smoke", "moco", data, **changes | {"init": ""}).key
    model = Trainer(recipe, data, CPU, path).model
    assert "120 tensors" in capsys.readouterr().out
    x = torch.rand(2, 1, 64, 64).expand(-1, 3, -1, -1)
    theirs.fc = torch.nn.Identity()
    for encoder in (model.encoder_q, model.encoder_k):
        with torch.no_grad():
            assert torch.allclose(encoder.eval()(x[:, :channels]).embedding, theirs.eval()(x), atol=1e-4)


def test_training_starts_from_a_run_of_this_program(make_data, tmp_path):
    data = make_data()
    run = pretrain(preset("smoke", "moco", data, **SMALL), data, tmp_path, progress=False)
    for path in (run.encoder_file, run.checkpoint_file):
        recipe = preset("smoke", "moco", data, **SMALL, init=initial_weights(path)[1])
        encoder = Trainer(recipe, data, CPU, path).model.encoder_q
        assert torch.equal(encoder.conv1.weight, run.load_encoder().conv1.weight)


def test_weights_that_do_not_fit_or_cannot_be_read_are_a_clear_error(make_data, tmp_path):
    data, path = make_data(), tmp_path / "imagenet.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    recipe = preset("smoke", "moco", data, init=initial_weights(path)[1])
    with pytest.raises(RunError, match="does not fit.*--set layout="):
        Trainer(recipe, data, CPU, path)
    with pytest.raises(RunError, match="--init PATH"):
        Trainer(recipe, data, CPU)
    for content in ({"conv1.weight": torch.zeros(3)}, [1, 2], {"state_dict": 3}):
        torch.save(content, path)
        with pytest.raises(RunError, match="imagenet.pth.*state dict"):
            initial_weights(path)
    path.write_bytes(b"not weights")
    with pytest.raises(RunError, match="state dict"):
        initial_weights(path)


def test_an_encoder_says_which_images_it_wants_and_the_transform_makes_them(make_data, tmp_path):
    data = make_data(channels=3)
    run = pretrain(preset("smoke", "random", data), data, tmp_path, progress=False)
    about = about_weights(run.encoder_file)
    assert "0 to 1" in about["input"] and (about["side"], about["channels"]) == (16, 3)
    x = transform(run.recipe)(Image.fromarray(data.images[0]))
    assert torch.allclose(x, to_float(torch.tensor(data.images[:1]))[0], atol=1e-6)
    gray = preset("smoke", "random", make_data("gray"))
    large = Image.fromarray(data.images[0]).resize((40, 40))
    x = transform(gray)(large)
    assert x.shape == (1, 16, 16)
    for mode in ("RGBA", "LA", "P"):
        same = large.convert("L").convert(mode)
        assert (transform(gray)(same) - transform(gray)(large.convert("L"))).abs().max() < 0.02, mode
    for wrong in (large.crop((0, 0, 40, 30)), large.convert("I"), large.convert("F")):
        with pytest.raises(ValueError, match="make it square and of eight bits"):
            transform(gray)(wrong)


class Elsewhere(torch.Tensor):
    """A tensor that numpy cannot read before it is copied to the processor, as one on a GPU."""

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_what_is_kept_may_come_from_another_device(tmp_path):
    kept = {"weight": torch.ones(3).as_subclass(Elsewhere), "own": torch.zeros(2)}
    with pytest.raises(TypeError):
        kept["weight"].numpy()
    save_kept(tmp_path / "kept.safetensors", kept, "said")
    said, found = read_kept(tmp_path / "kept.safetensors")
    assert said == "said" and found["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [{"stem": "imagenet", "width": 16}, {"width": 8}])
def test_shapes_at_which_bf16_breaks_on_a_processor_are_trained_in_fp32(make_data, shape):
    data = make_data()
    about = SMALL | {"log_every": 100, "bn_splits": 1} | shape
    one, two = (Trainer(preset("smoke", "moco", data, **about, precision=p), data, CPU) for p in ("fp32", "bf16"))
    assert [one.train_step().loss.item() for _ in range(4)] == [two.train_step().loss.item() for _ in range(4)]


class Crossings(TorchDispatchMode):
    """The operations that copy between a processor and another device, and wait for it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.found.append(operation)
        return out


@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_a_step_asks_a_device_for_nothing_and_copies_without_waiting(make_data, monkeypatch, arm):
    """On a device without memory, which cannot answer: reading a value or choosing by one there is an error."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **about: sgd(*args, **about | {"fused": False}))
    monkeypatch.setattr(torch, "autocast", lambda *args, **about: contextlib.nullcontext())
    data = make_data(channels=3)
    recipe = preset("smoke", arm, data, **SMALL | {"log_every": 1000, "monitor_every": 1000, "steps": 1000})
    trainer = Trainer(recipe, data, torch.device("meta"))
    trainer.step = 1  # the first one is logged
    with Crossings() as waited:
        for _ in range(4):
            trainer.train_step()
    assert trainer.held == 40 and not waited.found
    with Crossings() as waited:
        torch.rand(3).to("meta")
    assert waited.found


class ToyLoss(torch.nn.Module):
    """Mean absolute difference, times a number that is learnt."""

    def __init__(self, channels, pool, gain=1.0):
        super().__init__()
        self.pool, self.gain = pool, torch.nn.Parameter(torch.tensor(gain))

    def forward(self, query, key):
        return [self.gain * (u - v).abs().mean() for u, v in zip(query, key, strict=True)]


def test_a_loss_of_ones_own_trains_is_found_again_and_resumed(make_data, tmp_path, monkeypatch):
    data = make_data()
    toy = {"stage_loss": ToyLoss, "stage_weights": (0.1,) * 4, "stage_options": {"pool": (2, 2, 1, 1), "gain": 2.0}}
    monkeypatch.setitem(ARMS, "toy", toy)
    recipe = preset("smoke", "toy", data, **SMALL)
    pretrain(recipe, data, tmp_path / "a", progress=False, after_step=lambda trainer: trainer.step == 5)
    run = pretrain(preset("smoke", "toy", data, **SMALL), data, tmp_path / "a", progress=False)
    assert run.finished and [folder.name for folder in (tmp_path / "a").iterdir()] == [recipe.key]
    assert same_weights(run, pretrain(recipe, data, tmp_path / "b", progress=False))
    assert {"stage1", "stage4", "gradient_stage1"} <= set(run.history())
    assert preset("smoke", "toy", data, **SMALL, gain=3.0).key != recipe.key
    assert preset("smoke", "toy", data, **SMALL, gain=-1.0, pool=[1] * 4), "the class knows what its options may be"
    monkeypatch.delitem(ARMS, "toy")
    assert run.load_encoder(), "what is trained needs no loss"
    with pytest.raises(RunError, match="no arm has the loss ToyLoss-"):
        Trainer(recipe, data, CPU)
    monkeypatch.setitem(ARMS, "toy", toy | {"stage_options": {"breadth": 3}})
    with pytest.raises(ValueError, match="ToyLoss in .*test_pretrain.py cannot be made with stage_options=.*breadth"):
        Trainer(preset("smoke", "toy", data), data, CPU)


@pytest.mark.parametrize("arm", ["moco", "mse", "barlow-conditioned"])
def test_a_compiled_step_is_one_graph_that_is_compiled_once_and_gives_the_same_losses(make_data, monkeypatch, arm):
    data, graphs = make_data(channels=3), []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    # The usual backend calls a C++ compiler for a minute or more; this one traces alike, and without breaks or not.
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    recipe = preset("smoke", arm, data, **SMALL | {"steps": 14, "queue": 32}, width=2, precision="fp32")
    plain, compiled = (Trainer(recipe, data, CPU, compiled=compiled) for compiled in (False, True))
    for _ in range(recipe.steps):
        assert compiled.train_step().loss.item() == pytest.approx(plain.train_step().loss.item(), rel=1e-3)
    assert len(graphs) == 1, "neither logged steps nor the kNN monitor compile anything again"
    assert any(row.get("knn_auc") for row in compiled.history[:-1])
    assert compiled.state()["model"].keys() == plain.state()["model"].keys(), "either resumes the other"


def test_one_real_step_of_the_paper_preset_at_its_size(make_data):
    data = make_data(n=10, side=512)
    recipe = preset("paper", "mse", data, batch=2)
    trainer = Trainer(recipe, data, CPU)
    before = trainer.model.encoder_q.layer4[2].conv3.weight.clone()
    output = trainer.train_step()
    assert [tuple(stage.shape) for stage in output.query_stages] == [
        (2, 256, 16, 16),
        (2, 512, 16, 16),
        (2, 1024, 4, 4),
        (2, 2048, 4, 4),
    ]
    assert torch.isfinite(output.loss) and trainer.history[0]["stage4"] > 0
    assert not torch.equal(trainer.model.encoder_q.layer4[2].conv3.weight, before)
    assert int(trainer.model.filled) == 2 and len(trainer.model.queue) == recipe.queue


ERRORS = {
    "of a GPU": torch.OutOfMemoryError("in its own words"),
    "of a library": RuntimeError("CUDA out of memory. Tried"),
    "of a processor": RuntimeError("DefaultCPUAllocator: can't allocate"),
    "of numpy": MemoryError(),
    "other": RuntimeError("other"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_names_batch_and_side(make_data, tmp_path, monkeypatch, kind):
    data = make_data()

    def fails(self):
        raise ERRORS[kind]

    monkeypatch.setattr(Trainer, "train_step", fails)
    expected = (RuntimeError, "other") if kind == "other" else (RunError, "batch of 16 images of 16 px.*--set batch=")
    recipe = preset("smoke", "moco", data, **SMALL)
    with pytest.raises(expected[0], match=expected[1]):
        pretrain(recipe, data, tmp_path, progress=False)
