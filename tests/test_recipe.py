"""Claims about recipes and the machine they run on: nonsense is refused, arms are data, presets are what they say."""

import dataclasses
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from mocolayers.__main__ import main
from mocolayers.method.encoder import LAYOUTS
from mocolayers.recipe import ARMS, CHOICES, PRESETS, Views, loss_name, preset
from mocolayers.runtime import RunError, atomic_write, autocast_type, resolve_device
from mocolayers.training.pretrain import build_moco
from mocolayers.training.runs import build_encoder

NONSENSE = {
    "schedule": ("cosin", "step"),
    "steps": (-3, 0, 2.5, "10"),
    "queue": (0, -5),
    "dim": (0,),
    "momentum": (1.5, 1, -0.1),
    "sgd_momentum": (1,),
    "temperature": (0, -1, float("nan"), float("inf"), None, 1e-60, True),
    "lr": (-1, 0, True, 1e300, 10**400),
    "weight_decay": (-1e-4, False),
    "seed": (-1, 2**63, True),
    "batch": (0, -4, 1),
    "bn_splits": (0, 7, 32, 99),
    "width": (0, 8.0),
    "layout": ("resnet101",),
    "stem": ("large",),
    "head": ("cubic",),
    "precision": ("fp8",),
    "stage_loss": ("vicreg", "StageMSE"),
    "stage_weights": ((1, 2), 0.1, (1, 1, 1, -1), (1, 1, 1, "1")),
    "log_every": (0,),
    "monitor_every": (0,),
    "zero_init_residual": ("yes",),
    "pool": ((4, 4), 4, (0, 1, 1, 1), (1.0, 1, 1, 1)),
    "scale_free": (1, "True"),
    "views": ("none",),
    "stage_options": (3, "pool"),
}


@pytest.mark.parametrize("field, value", [(field, value) for field in NONSENSE for value in NONSENSE[field]])
def test_a_value_that_makes_no_sense_is_refused_by_name(make_data, field, value):
    data = make_data()
    recipe = preset("smoke", "mse", data, batch=32)
    with pytest.raises(ValueError, match=f"^{field}=.*give "):
        if field in recipe.stage_options:
            preset("smoke", "mse", data, **{field: value})
        else:
            dataclasses.replace(recipe, **{field: value})


@pytest.mark.parametrize(
    "field, value", [("crop", 0), ("crop", 1.5), ("ratio", 0), ("rotation", -5), ("hflip", 2), ("gray", "no")]
)
def test_views_that_cannot_be_drawn_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}=.*give a number"):
        Views(**{field: value})


@pytest.mark.parametrize("sigma", [(2.0, 1.0), (0.0, 0.0), (0.1, float("nan")), 5, (1.0,)])
def test_a_blur_that_cannot_be_drawn_is_refused_by_name(sigma):
    with pytest.raises(ValueError, match="^sigma=.*the lower first"):
        Views(sigma=sigma)


def test_a_change_of_what_is_a_field_and_an_option_of_the_loss_is_refused(make_data, monkeypatch):
    monkeypatch.setitem(ARMS, "mine", ARMS["mse"] | {"stage_options": {"momentum": 0.5}})
    with pytest.raises(ValueError, match="'momentum' is a field of every recipe and an option of mine"):
        preset("smoke", "mine", make_data(), momentum=0.9)


@pytest.mark.parametrize("field, value", [("projector", 0), ("off_diagonal", -1.0), ("scale", float("nan"))])
def test_options_of_the_barlow_loss_are_refused_by_name(make_data, field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        preset("smoke", "barlow", make_data(), **{field: value})


def test_the_command_line_says_the_same_as_a_notebook(make_data, tmp_path, monkeypatch, capsys):
    data = make_data()
    monkeypatch.setenv("MOCOLAYERS_DATA", str(tmp_path / "data"))
    for word in ("schedule=cosin", "steps=-3", "temperature=0.0", "bn_splits=7"):
        field, value = word.split("=")
        value = value if field == "schedule" else type(getattr(preset("smoke", "moco", data), field))(value)
        with pytest.raises(ValueError) as caught:
            preset("smoke", "moco", data, **{field: value})
        assert main(["pretrain", "--dataset", "tiny", "--preset", "smoke", "--set", word]) == 1
        assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_the_released_recipe_has_as_many_epochs_with_any_batch(make_data):
    data = make_data()
    rows = len(data.pretraining_rows())
    steps = {batch: preset("paper", "moco", data, batch=batch).steps for batch in (2, 4)}
    assert steps == {batch: 100 * (rows // batch) for batch in (2, 4)}
    assert preset("paper", "moco", data, batch=2, steps=7).steps == 7
    for wrong in ("abc", 0, -8, 2.5):
        with pytest.raises(ValueError, match="^batch=.* cannot be trained; give a whole number"):
            preset("paper", "moco", data, batch=wrong)


@pytest.mark.parametrize(
    "field", ["seed", "arm", "dataset", "side", "channels", "fingerprint", "stage_loss", "stage_options"]
)
def test_what_follows_from_data_arm_and_seed_cannot_be_changed_beside_them(make_data, field):
    with pytest.raises(ValueError, match=f"'{field}' cannot be changed"):
        preset("smoke", "moco", make_data(), 0, **{field: 1})


@pytest.mark.parametrize("arguments", [("huge", "moco"), ("smoke", "simclr"), ("smoke", "moco", "learning_rate")])
def test_an_unknown_preset_arm_or_field_lists_the_known_ones(make_data, arguments):
    name, arm, *changes = arguments
    with pytest.raises(ValueError, match="barlow|lesson|temperature"):
        preset(name, arm, make_data(), 0, **dict.fromkeys(changes, 1))


@pytest.mark.parametrize("arm", ["random", "supervised"])
def test_an_arm_without_pretraining_stays_without_whatever_the_others_change(make_data, arm):
    data = make_data()
    assert preset("lesson", arm, data, steps=600).key == preset("lesson", arm, data).key
    with pytest.raises(ValueError, match="^steps=5"):
        dataclasses.replace(preset("lesson", arm, data), steps=5)


def test_a_recipes_key_changes_with_every_field(make_data):
    recipe = preset("smoke", "mse", make_data())
    others = {
        "arm": "mine",
        "dataset": "other",
        "fingerprint": "0" * 12,
        "layout": "resnet18",
        "stem": "imagenet",
        "head": "linear",
        "schedule": "constant",
        "precision": "fp32",
        "stage_loss": "Mine-01234567",
        "stage_weights": (1.0, 1.0, 1.0, 1.0),
        "stage_options": recipe.stage_options | {"scale_free": True},
        "views": Views(),
        "init": "0123456789ab",
        "zero_init_residual": True,
    }
    keys = {recipe.key}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        changed = others[field.name] if field.name in others else value * 2 if value else 1
        changed = 0.5 if field.name in ("momentum", "sgd_momentum") else changed
        keys.add(dataclasses.replace(recipe, **{field.name: changed}).key)
    assert len(keys) == len(dataclasses.fields(recipe)) + 1


def test_options_of_a_stage_loss_are_changed_like_fields(make_data):
    data = make_data()
    changed = preset("smoke", "mse", data, scale_free=True)
    assert changed.stage_options == preset("smoke", "mse-normalized", data).stage_options
    assert not ARMS["mse"]["stage_options"]["scale_free"], "the arm itself is as before"
    with pytest.raises(ValueError, match="'projector' cannot be changed"):
        preset("smoke", "mse", data, projector=8)


def test_every_choice_of_architecture_can_be_built(make_data):
    assert set(CHOICES["layout"]) == set(LAYOUTS)
    for name in ("layout", "stem", "head", "zero_init_residual"):
        for value in CHOICES[name]:
            build_moco(preset("smoke", "moco", make_data(), **{name: value}))


RELEASED_SIDE = {"chest": 512, "histology": 255, "retina": 299}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("modality", RELEASED_SIDE)
@pytest.mark.parametrize("name", PRESETS)
def test_every_stage_is_as_large_as_what_it_is_pooled_to(name, modality, arm):
    side = RELEASED_SIDE[modality] if "paper" in name else 28
    rows = np.arange(100_000)
    about = {"name": "made up", "fingerprint": "", "channels": 3, "side": side, "modality": modality}
    recipe = preset(name, arm, SimpleNamespace(**about, pretraining_rows=lambda: rows))
    with torch.device("meta"):
        maps = build_encoder(recipe)(torch.empty(2, 3, side, side)).stages
    pool = recipe.stage_options.get("pool", (1,) * 4)
    assert all(size <= stage.shape[2] for size, stage in zip(pool, maps, strict=True))
    if "paper" in name and modality == "histology":
        assert set(pool) == {1}, "as in every released version"
    assert recipe.views.released_order == ("paper" in name)


LOSS = """
class Toy:
    factor = 1

    def forward(self, query, key):
        return query
"""


def test_a_loss_of_ones_own_is_named_after_its_file(tmp_path):
    """The whole file, since the class may call a function beside it."""

    def name(text):
        path = tmp_path / "plugin.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("plugin", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return loss_name(module.Toy)

    first = name(LOSS)
    assert first.startswith("Toy-")
    assert name(LOSS) == first
    assert name("def helper():\n    pass\n" + LOSS) != first
    assert name(LOSS.replace("return query", "return key  ")) != first
    assert name(LOSS.replace("factor = 1", "factor = 2")) != first


def test_a_loss_from_a_notebooks_cell_is_named_after_its_source():
    shell = InteractiveShell()

    def name(text):
        assert shell.run_cell(text, store_history=True).success
        return loss_name(shell.user_ns["Toy"])

    assert name(LOSS) == name(LOSS) != name(LOSS.replace("query\n", "key\n"))
    exec(LOSS, made := {})
    with pytest.raises(ValueError, match="no source of Toy"):
        loss_name(made["Toy"])


PAGES = """
import resource, torch
from mocolayers.runtime import resolve_device
resolve_device("cpu")
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26, dtype=torch.uint8)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept where the C library is glibc")
def test_freed_memory_is_kept_for_the_next_tensors_on_a_processor():
    new = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout
    assert int(new) < 2**26 / 10, "else each page of each tensor is a new one"


def test_auto_takes_the_fastest_device_that_is_there(monkeypatch):
    def device(cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return resolve_device("auto").type

    assert [device(True, False), device(False, True), device(False, False)] == ["cuda", "mps", "cpu"]


@pytest.mark.parametrize("name", ["tpu", "", "cuda:x", "cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RunError, match="auto") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_auto_never_takes_emulated_bf16(monkeypatch):
    auto = {}
    for card, has_it in {"a T4": False, "an A100": True}.items():
        # What torch answers on such a card: emulation counts unless one asks without it.
        answer = functools.partial(lambda has_it, including_emulation=True: has_it or including_emulation, has_it)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        auto[card] = autocast_type("auto", torch.device("cuda"))
    assert auto == {"a T4": None, "an A100": torch.bfloat16}
    assert autocast_type("auto", torch.device("mps")) is None


def test_two_threads_may_write_one_file_at_a_time(tmp_path):
    path, both = tmp_path / "history.csv", threading.Barrier(2, timeout=10)

    def write(temporary):
        temporary.write_text("whole")
        both.wait()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(atomic_write, path, write) for _ in range(2)]:
            done.result()
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"] and path.read_text() == "whole"


def test_what_a_killed_process_was_writing_is_removed_a_day_later_by_the_next_that_writes_the_file(tmp_path):
    code = "import os, sys; from mocolayers.runtime import Path, atomic_write; "
    code += "atomic_write(Path(sys.argv[1]), lambda path: [path.write_text('half'), os.kill(os.getpid(), 9)])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "history.csv"])
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".history.csv.mine", ".history.csv.1-2.txt", ".other.csv.1-2")]
    for path in others:
        path.write_text("mine")
    atomic_write(tmp_path / "history.csv", lambda path: path.write_text("whole"))
    assert left.exists(), "perhaps another process is writing it"
    for path in (left, *others):
        os.utime(path, (1e9, 1e9))
    atomic_write(tmp_path / "history.csv", lambda path: path.write_text("whole"))
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "history.csv"])


def test_training_needs_no_module_that_windows_lacks_and_runtime_no_torch():
    words = """
import sys
import mocolayers.recipe, mocolayers.runtime
assert "torch" not in sys.modules
import pandas, psutil, torch  # which have their own ways on each system
sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd", "grp"))
import mocolayers.training.pretrain, mocolayers.training.distributed
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
