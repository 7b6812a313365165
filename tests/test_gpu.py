"""Claims about an NVIDIA GPU: `pytest -m gpu`. Without one, only the benchmark's trial at tiny size runs."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mocolayers.data.labels import label_subset
from mocolayers.evaluation import probes
from mocolayers.evaluation.features import stage_features
from mocolayers.evaluation.finetune import fine_tune
from mocolayers.evaluation.judge import judge
from mocolayers.evaluation.probes import GPUProbe, fit_probe, predict
from mocolayers.recipe import PRETRAINED_ARMS, Evaluation, preset
from mocolayers.runtime import RunError, autocast_type
from mocolayers.training import distributed
from mocolayers.training.pretrain import Trainer, pretrain

HOME = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"batch": 32, "queue": 80, "log_every": 10, "monitor_every": 20, "steps": 40, "precision": "fp32"}
PLAN = Evaluation(subsets=1, least_steps=20, batch=16, checks=2, most_validation_rows=40, resamples=20)
# cuBLAS reads this when it starts; without it, it may add in another order the next time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def on_gpu(test):
    """A test that `pytest -m gpu` chooses, and that is skipped where there is no GPU."""
    reason = "torch finds no NVIDIA GPU here"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@pytest.fixture
def exact(monkeypatch):
    """fp32 that is fp32, and the same numbers each time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # The gradient of adaptive pooling has no deterministic form on a GPU; with maps of channels last it adds in order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def losses(trainer, steps):
    return [trainer.train_step().loss.item() for _ in range(steps)]


@on_gpu
@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_bf16_and_fp32_losses_agree(make_data, arm):
    data = make_data(channels=3)
    found = [
        losses(Trainer(preset("smoke", arm, data, **SMALL | {"precision": p}), data, GPU), 5) for p in ("fp32", "bf16")
    ]
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.05, abs=0.02)


@on_gpu
@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_twenty_steps_on_a_gpu_are_those_of_a_processor(make_data, exact, arm):
    data = make_data(channels=3)
    # A rate at which rounding does not grow within twenty steps.
    recipe = preset("smoke", arm, data, 1, lr=3e-4, **SMALL)
    first = Trainer(recipe, data, CPU).model.encoder_q.layer1[0].conv1.weight.detach().clone()
    trainers = [Trainer(recipe, data, device) for device in (CPU, GPU)]
    one, two = (losses(trainer, 20) for trainer in trainers)
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    moved = [trainer.model.encoder_q.layer1[0].conv1.weight.detach().cpu() - first for trainer in trainers]
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
    queues = [trainer.model.queue.cpu() for trainer in trainers]
    assert torch.allclose(*queues, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(make_data, tmp_path, exact, compiled):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL)
    about = {"device": "cuda", "progress": False, "compiled": compiled}
    pretrain(recipe, data, tmp_path / "a", after_step=lambda trainer: trainer.step == 15, **about)
    resumed, straight = (pretrain(recipe, data, tmp_path / name, **about) for name in "ab")
    for one, two in zip(resumed.load_encoder().parameters(), straight.load_encoder().parameters(), strict=True):
        assert torch.equal(one, two)


@on_gpu
@pytest.mark.parametrize("arm", ["moco", "mse", "barlow-conditioned"])
def test_a_compiled_step_gives_the_losses_of_training_as_it_is(make_data, exact, arm, monkeypatch):
    data, modes, original = make_data(channels=3), [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: modes.append(options["mode"]) or original(f, **options))
    recipe = preset("smoke", arm, data, lr=3e-4, **SMALL)
    counted = torch._dynamo.utils.counters
    counted.clear()
    plain, compiled = (Trainer(recipe, data, GPU, compiled=compiled) for compiled in (False, True))
    assert losses(compiled, 40) == pytest.approx(losses(plain, 40), rel=2e-3)
    assert compiled.history[-1]["knn_auc"] == pytest.approx(plain.history[-1]["knn_auc"], abs=0.02)
    # CUDA graphs are asked for, something is compiled, and no graph of it is left out.
    assert (
        modes == ["reduce-overhead"]
        and counted["stats"]["unique_graphs"]
        and not counted["inductor"]["cudagraph_skips"]
    )


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arm", ["moco", "mse", "barlow-conditioned"])
def test_a_step_waits_for_nothing(make_data, arm, compiled):
    data = make_data(channels=3)
    recipe = preset("smoke", arm, data, **SMALL | {"log_every": 1000, "monitor_every": 1000, "steps": 1000})
    trainer = Trainer(recipe, data, GPU, compiled=compiled)
    for _ in range(12):
        trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.train_step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            trainer.train_step().loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_nccl_in_one_process_trains_as_without_it(make_data, monkeypatch, exact):
    data = make_data()
    recipe = preset("smoke", "mse", data, **SMALL)
    wanted = losses(Trainer(recipe, data, GPU), 5)
    about = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
    for name, value in about.items():
        monkeypatch.setenv(name, str(value))
    with distributed.processes("cuda"):
        assert torch.distributed.get_backend() == "nccl"
        trainer = Trainer(recipe, data, GPU)
        with patch.object(distributed, "world_size", lambda: 2):
            trainer.in_parallel = distributed.parallel(trainer.model)
        assert isinstance(trainer.in_parallel, torch.nn.parallel.DistributedDataParallel)
        assert losses(trainer, 5) == pytest.approx(wanted, rel=1e-4)
        del trainer


@on_gpu
def test_features_of_a_gpu_are_those_of_a_processor_within_its_precision(pretrained):
    data, run = pretrained()
    encoder, rows = run.load_encoder(), data.rows("test")
    for one, two in zip(*(stage_features(encoder, data, rows, device=name) for name in ("cpu", "cuda")), strict=True):
        error = np.linalg.norm(two - one) / np.linalg.norm(one)
        assert error < 0.03 and (error > 0 or autocast_type("auto", GPU) is None)
    assert encoder.conv1.weight.device == CPU


@on_gpu
@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_evaluation_happens_on_the_gpu_that_was_asked_for(pretrained, monkeypatch, protocol):
    data, run = pretrained(n=600)
    fitted = []
    monkeypatch.setattr(
        probes, "GPUProbe", lambda *about, device: fitted.append(device.type) or GPUProbe(*about, device)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    row = judge(run, data, PLAN, 1.0, 0, protocol, device="cuda")
    assert torch.cuda.max_memory_allocated() > before and row["auc"] > 0.8
    assert fitted == (["cuda"] * len(PLAN.penalties) if protocol == "linear" else [])


@on_gpu
def test_a_fine_tuning_on_a_gpu_learns_what_one_on_a_processor_does(pretrained):
    data, run = pretrained(n=600)
    rows, test = label_subset(data, 1.0, 0), data.rows("test")
    for device in ("cpu", "cuda"):
        p = fine_tune(run.load_encoder(), data, rows, PLAN, 0, device).predict(data, test)
        assert roc_auc_score(data.labels[test], p[:, 1]) > 0.9, device


@on_gpu
def test_wide_probes_on_a_gpu_are_scikit_learns():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1500, 20)) @ rng.normal(size=(20, 512)) + rng.normal(size=(1500, 512))).astype(np.float32)
    classes = x[:, :14] + 5 * rng.normal(size=(1500, 14)) > 4
    wanted = predict(fit_probe(x[:1000], classes[:1000], "multilabel", 0.01), x[1000:], 14)
    found = predict(GPUProbe(x[:1000], classes[:1000], "multilabel", 0.01, GPU), x[1000:], 14)
    for label in range(14):
        one, two = (roc_auc_score(classes[1000:, label], p[:, label]) for p in (wanted, found))
        assert one == pytest.approx(two, abs=1e-4)


@on_gpu
def test_out_of_memory_is_one_line_with_batch_and_side(make_data, tmp_path):
    data = make_data(n=40, side=512)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(RunError, match="out of memory: a batch of 16 images of 512 px.*--set batch=") as caught:
            pretrain(preset("paper", "mse", data), data, tmp_path, "cuda", progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "\n" not in str(caught.value)


# What a machine with a GPU may lack.
WITHOUT = """
import runpy, sys
for name in ("papermill", "ipywidgets", "IPython", "medmnist", "matplotlib", "tyro", "nbformat", "lightly"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_benchmark_of_a_gpu_runs_to_its_end_at_tiny_size_without_what_it_need_not_have(tmp_path):
    script, out = str(HOME / "tests" / "benchmarks" / "gpu.py"), tmp_path / "found.md"
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT, script, "--tiny", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = out.read_text()
    assert text.count("\n## ") == 6 and text.count("| compute bound | ") == 4 == text.count("| released loop with MSE")
    assert text.count("ours, mse, compiled") == 4 and "14 labels" in text and torch.__version__ in text
    left = [line for line in done.stdout.splitlines() if "left out" in line and not line.startswith("|")]
    assert all("lightly" in line for line in left) and len(set(left)) == 1, left
