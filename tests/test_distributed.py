"""Claims about training in several processes: two gloo processes on this machine against one with the joined batch."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch
from torch.multiprocessing import get_context

import mocolayers.training.pretrain as module
from mocolayers.__main__ import main
from mocolayers.data.prepared import load
from mocolayers.evaluation.finetune import fine_tune
from mocolayers.method import collectives
from mocolayers.method.collectives import own_part, rank
from mocolayers.method.encoder import Encoded
from mocolayers.notebook.series import HOME
from mocolayers.recipe import PRETRAINED_ARMS, Evaluation, preset
from mocolayers.runtime import RunError
from mocolayers.training import distributed
from mocolayers.training.pretrain import Trainer, build_moco, pretrain

CPU = torch.device("cpu")
# Two groups of batch-norm: one in each of two processes.
SMALL = {"batch": 32, "queue": 80, "steps": 6, "monitor_every": 3, "log_every": 3, "bn_splits": 2, "precision": "fp32"}
PLAN = Evaluation(subsets=1, least_steps=4, batch=16, checks=2, most_validation_rows=40, resamples=20)


def small(data, arm):
    # A rate at which rounding does not grow within a few steps.
    return preset("smoke", arm, data, 1, lr=0.01, **SMALL)


def of_batch_norm(name):
    """Whether a buffer counts or averages batches, of which a process sees fewer."""
    return "running" in name or "num_batches" in name


def state_after(data, arm, steps=3):
    """Loss terms and gradients of each step, and weights and queue at the end."""
    trainer, found = Trainer(small(data, arm), data, CPU), []
    for _ in range(steps):
        output = trainer.train_step()
        terms = distributed.averaged(output.terms)
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((terms, gradients))
    weights = {name: v for name, v in trainer.model.state_dict().items() if not of_batch_norm(name)}
    return {"steps": found, "weights": weights, "history": trainer.history}


def in_two_processes(job, *arguments, survivors=2):
    """What `job(*arguments)` returns in each of two processes that train together, as far as they live to tell."""
    context = get_context("spawn")
    answers, port = context.Queue(), free_port()
    started = [context.Process(target=_process, args=(rank, port, answers, job, arguments)) for rank in (0, 1)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=120) for _ in range(survivors))
    for process in started:
        process.join(30)
    if failed := [text for text in found.values() if isinstance(text, str)]:
        pytest.fail("\n".join(failed))
    return [found[rank] for rank in sorted(found)]


def _process(rank, port, answers, job, arguments):
    import traceback

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    try:
        with distributed.processes("cpu"):
            answers.put((rank, job(*arguments)))
    except RunError as error:
        answers.put((rank, error))
    except Exception:
        answers.put((rank, traceback.format_exc()))


def free_port():
    import socket

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def all_arms(folder):
    """`state_after` of every arm; one pair of processes for all, because starting them takes most of the time."""
    data = load("tiny", folder)
    return {arm: as_numpy(state_after(data, arm)) for arm in PRETRAINED_ARMS}


def as_numpy(found):
    """Tensors as arrays: they go through a queue without sharing memory with a process that has ended."""
    if isinstance(found, dict):
        return {name: as_numpy(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [as_numpy(value) for value in found]
    return found.numpy().copy() if isinstance(found, torch.Tensor) else found


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Every arm in two processes and in one: (first, second, alone)."""
    from conftest import make_arrays, make_card

    from mocolayers.data.prepared import save_prepared

    folder = tmp_path_factory.mktemp("data")
    save_prepared(folder / "tiny", make_arrays(channels=3), make_card(channels=3))
    return *in_two_processes(all_arms, folder), all_arms(folder)


@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_two_processes_give_the_loss_the_gradients_and_the_queue_of_one(compared, arm):
    for found in compared[:2]:
        one, two = compared[2][arm], found[arm]
        for (terms, gradients), (other_terms, other_gradients) in zip(one["steps"], two["steps"], strict=True):
            assert other_terms == pytest.approx(terms, rel=1e-4, abs=1e-6)
            assert gradients.keys() == other_gradients.keys()
            for name, gradient in gradients.items():
                scale = max(np.abs(gradient).max(), 1e-4)
                assert np.abs(other_gradients[name] - gradient).max() < 2e-3 * scale, name
        for name, value in one["weights"].items():
            assert np.allclose(two["weights"][name], value, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("arm", PRETRAINED_ARMS)
def test_both_processes_hold_the_same_weights_and_queue(compared, arm):
    first, second = (found[arm]["weights"] for found in compared[:2])
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["filled"] == 80


def test_monitors_describe_the_whole_batch_where_a_mean_does(compared):
    one, two = (found["barlow"]["history"][-1] for found in (compared[2], compared[0]))
    for name in ("loss", "stage4", "stage1_mse", "stage4_diagonal", "gradient_stage4", "contrastive_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=0.02, abs=1e-4), name


def shuffled(folder):
    """Which images each process encodes as keys, and the stages that come back, for a batch of numbered images."""
    data = load("tiny", folder)
    model = build_moco(small(data, "mse")).train()
    numbers = torch.arange(32.0)[own_part(32)]
    x = numbers.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    seen = []
    model.encoder_k.forward = lambda x: seen.append(x[:, 0, 0, 0].clone()) or Encoded([x] * 4, x.mean(dim=(2, 3)))
    key = model._encode_shuffled(x, torch.randperm(32, generator=torch.Generator().manual_seed(0)), (1,) * 4)
    return as_numpy([seen[0], key.stages[0][:, 0, 0, 0], key.embedding[:, 0]])


def test_keys_are_shuffled_over_processes_and_stages_come_back_in_order(make_data, tmp_path):
    make_data(channels=3)
    parts = in_two_processes(shuffled, tmp_path / "data")
    for process, (seen, stages, embedding) in enumerate(parts):
        own = np.arange(32)[16 * process : 16 * (process + 1)]
        assert 0 < len(set(seen) & set(own)) < 16, "each process encodes keys of both"
        assert np.array_equal(stages, own)
        assert np.array_equal(embedding, np.arange(32))


def fine_tuned(folder):
    data = load("tiny", folder)
    trainer = Trainer(small(data, "moco"), data, CPU)
    model = fine_tune(trainer.model.encoder_q.eval(), data, data.rows("train"), PLAN, 0)
    return model.predict(data, data.rows("test"))


def test_fine_tuning_returns_the_same_classifier_on_every_process(make_data, tmp_path):
    make_data()
    first, second = in_two_processes(fine_tuned, tmp_path / "data")
    alone = fine_tuned(tmp_path / "data")
    assert np.array_equal(first, second) and first.shape == alone.shape
    # Batch-norm sees each process's part, so the two are near, not equal.
    assert np.corrcoef(first[:, 1], alone[:, 1])[0, 1] > 0.9


def trained(folder, runs, killed_at=None):
    """The weights of a run that saves at every step; process 1 may be killed in the middle of it."""

    class Mortal(Trainer):
        def train_step(self):
            if rank() == 1 and self.step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train_step()

    data = load("tiny", folder)
    with patch.multiple(module, Trainer=Mortal, CHECKPOINT_SECONDS=0):
        run = pretrain(small(data, "mse"), data, runs, "cpu", progress=False)
    weights = run.load_encoder().state_dict()
    return as_numpy({name: value for name, value in weights.items() if not of_batch_norm(name)})


def test_a_killed_process_is_reported_and_the_run_goes_on_in_two_processes_or_in_one(make_data, tmp_path):
    make_data()
    folder = tmp_path / "data"
    alone = trained(folder, tmp_path / "alone")
    (error,) = in_two_processes(trained, folder, tmp_path / "two", 4, survivors=1)
    assert isinstance(error, RunError) and "goes on from the last checkpoint" in str(error)
    assert list(tmp_path.glob("two/*/checkpoint.pt")) and not list(tmp_path.glob("two/*/encoder.safetensors"))
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for resumed in (*in_two_processes(trained, folder, tmp_path / "two"), trained(folder, tmp_path / "one")):
        assert all(np.allclose(resumed[name], value, rtol=1e-3, atol=2e-4) for name, value in alone.items())


def test_torchrun_ends_all_processes_when_one_dies(make_data, tmp_path):
    make_data()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "mocolayers", "pretrain", "--dataset", "tiny", "--preset", "smoke", "--device", "cpu"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--set", "steps=1000"]
    environment = os.environ | {"MOCOLAYERS_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("runs/*/recipe.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    _, said = running.communicate(timeout=60)
    assert running.returncode != 0 and "SIGKILL" in said
    assert not any(worker.is_running() for worker in workers)


LEAVES_THREADS = """
from pathlib import Path
from mocolayers.training import distributed

with distributed.processes("cpu"):
    import torch.distributed.nn.functional
    distributed.from_first(lambda: None)
print("left:", *((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process have names on Linux only")
def test_no_thread_of_a_group_outlives_it_to_abort_the_process_at_exit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LEAVES_THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "left:" in done.stdout and "gloo" not in done.stdout


def test_a_batch_that_processes_cannot_share_is_a_clear_error(make_data, monkeypatch):
    data = make_data()
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="3 processes; start a number of them"):
        Trainer(small(data, "moco"), data, CPU)


@pytest.fixture
def alone(monkeypatch):
    """A training by torchrun of one process."""
    about = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in about.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("words", ["nccl", "Connection closed", "socket", "timed out", "gloo is a sort of goo"])
def test_an_error_of_our_own_is_not_hidden_by_its_words(alone, words):
    with pytest.raises(RuntimeError, match=words), distributed.processes("cpu"):
        raise RuntimeError(f"a stage cannot be pooled: {words}")


def test_an_error_of_the_collectives_says_that_another_process_ended(alone):
    with pytest.raises(RunError, match="another process"), distributed.processes("cpu"):
        raise torch.distributed.DistNetworkError("the other side is gone")


def test_help_shows_how_to_start_several_processes(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert "torchrun --nproc-per-node" in capsys.readouterr().out
