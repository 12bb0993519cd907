"""Several processes train like one: equal losses, interchangeable checkpoints, and termination if one dies."""

import os
import signal
import sys
import time
from copy import deepcopy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from hybridmem.cli.consolidate import consolidate
from hybridmem.distributed import average_gradients, shard
from hybridmem.training import PretrainModule
from hybridmem.training.checkpoints.loading import load_checkpoint
from tests.hybridmem.models import tiny_config, tiny_model
from tests.hybridmem.training.runs import hybridmem, logged, write_config
from tests.several import SECONDS, as_processes, command, fit, start

from . import test_module as test_policy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
}
CARRIED = {"data__init_args__mode": "continuous", "model__init_args__carry_state": True}
DAPO = {"class_path": "hybridmem.rl.DAPO", "init_args": {}}
WIDE = {"class_path": "hybridmem.rl.GRPO", "init_args": {"loss_type": "bnpo", "scale_rewards": "batch"}}
LOOKS = {**test_policy.ATTENTION, "init_args": {"exploration": 0.5, "positions": "predicting"}}


def pretraining(folder, processes=1, strategy="auto", **changes):
    """Write a pretraining configuration with four rows per step over all ranks and a carried memory."""
    folder.mkdir()
    share = {"trainer__devices": processes, "data__init_args__batch_size": 4 // processes}
    quick = {"trainer__max_steps": 4, "trainer__val_check_interval": 4, "trainer__enable_progress_bar": False}
    return write_config(folder, trainer__strategy=strategy, **share, **quick, **CARRIED, **changes)


def policy(folder, processes=1, strategy="auto", **changes):
    """Write a reinforcement learning configuration with four prompts per step."""
    folder.mkdir()
    share = {"trainer__devices": processes, "data__init_args__batch_size": 4 // processes}
    share |= {"trainer__max_steps": 4, "trainer__val_check_interval": 2}
    return test_policy.write_config(folder, trainer__strategy=strategy, **share, **changes)


def same_losses(*runs, names):
    """Check that runs logged equal losses in every step."""
    first, *others = runs
    for name in names:
        expected = logged(first, name)
        assert expected, name
        for run in others:
            assert logged(run, name) == pytest.approx(expected, abs=1e-5), (run.name, name)


def test_pretraining_and_its_checkpoints(tmp_path, monkeypatch):
    """One process, two, and two with sharded weights; each resumes from a checkpoint of another."""
    one, ddp, sharded = (tmp_path / name for name in ("one", "ddp", "sharded"))
    hybridmem(monkeypatch, "fit", "--config", pretraining(one))
    fit(2, "--config", pretraining(ddp, 2, "ddp"))
    fit(2, "--config", pretraining(sharded, 2, SHARDED))
    same_losses(one, ddp, sharded, names=("train/loss", "train/bits_per_byte", "val/bits_per_byte"))
    whole = tmp_path / "whole.ckpt"
    consolidate(sharded / "run" / "step=2.ckpt", whole)
    assert {seals.name for seals in (sharded / "run" / "step=2.ckpt").glob("*.b2")} == {"0.b2", "1.b2"}
    assert not list((sharded / "run").glob("*.part"))
    again = [tmp_path / f"{name} again" for name in ("one", "ddp", "sharded")]
    hybridmem(monkeypatch, "fit", "--config", pretraining(again[0]), "--ckpt_path", whole)
    fit(2, "--config", pretraining(again[1], 2, "ddp"), "--ckpt_path", one / "run" / "step=2.ckpt")
    fit(2, "--config", pretraining(again[2], 2, SHARDED), "--ckpt_path", ddp / "run" / "step=2.ckpt")
    expected = load_checkpoint(one / "run" / "step=4.ckpt")["state_dict"]
    for run in again:
        weights = load_checkpoint(run / "run" / "step=4.ckpt")["state_dict"]
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0, msg=f"{run.name}: {name}")


@pytest.mark.parametrize(
    ("strategy", "objectives"),
    [("ddp", [DAPO]), ("ddp", [test_policy.TOKENS, LOOKS]), (SHARDED, [WIDE, test_policy.ATTENTION])],
)
def test_reinforcement_learning(tmp_path, monkeypatch, strategy, objectives):
    """Ranks share the groups, sample the responses that one process would sample, and gather rewards."""
    changes = {"model__init_args__objectives": deepcopy(objectives)}
    one, two = tmp_path / "one", tmp_path / "two"
    hybridmem(monkeypatch, "fit", "--config", policy(one, **changes))
    fit(2, "--config", policy(two, 2, strategy, **changes))
    same_losses(one, two, names=("loss", "reward", "reward_std", "completions/mean_length", "val/pass@1"))


class KeepLearned(L.Callback):
    """Callback that saves each rank's own parameters of objectives."""

    def on_train_end(self, trainer, pl_module):
        """Save them in the run's folder."""
        torch.save(pl_module.learned.state_dict(), f"{trainer.default_root_dir}/learned_{trainer.global_rank}.pt")


@pytest.mark.parametrize("settings", [{"budget": 0.5}, {"unit": "token", "prefill": "allocated"}])
def test_an_allocation_learned_by_two_processes_is_that_of_one(tmp_path, monkeypatch, settings):
    """Every rank holds the φ, the price and the counters that one process learns from the joint batch."""
    objective = {"class_path": "hybridmem.rl.AllocationRL", "init_args": {**settings, "lr": 3.0}}
    changes = {"model__init_args__objectives": [objective], "model__init_args__num_iterations": 1}
    changes["model__init_args__optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    changes["trainer__callbacks"] = [{"class_path": f"{__name__}.KeepLearned"}]
    one, two = tmp_path / "one", tmp_path / "two"
    hybridmem(monkeypatch, "fit", "--config", policy(one, **changes))
    fit(2, "--config", policy(two, 2, "ddp", **changes))
    same_losses(one, two, names=("loss", "reward", "allocation/cost", "allocation/price", "allocation/closed"))
    expected = torch.load(one / "run" / "learned_0.pt")
    first, second = (torch.load(two / "run" / f"learned_{rank}.pt") for rank in range(2))
    assert expected.keys() == first.keys() == second.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=name)
    assert expected["Allocation.num_rollouts"] == 4


def averaged(rank):
    """Return the gradient of a whole parameter after averaging."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, rank])
    average_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])
    return parameter.grad


def test_gradients_of_whole_parameters_are_averaged():
    for found in as_processes(2, averaged):
        assert found.tolist() == [1.0, 0.5]


def test_groups_that_were_refined_in_one_process_alone(tmp_path, monkeypatch):
    """Ranks with different numbers of responses take the same steps and weight all responses equally."""
    refined = {"critic": {"class_path": "hybridmem.rl.IndicativeCritic"}, "correct_reward": 0.9}
    objective = {"class_path": "hybridmem.rl.CritiqueGRPO", "init_args": refined}
    changes = {"model__init_args__objectives": [objective], "model__init_args__steps_per_generation": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    hybridmem(monkeypatch, "fit", "--config", policy(one, **changes))
    fit(2, "--config", policy(two, 2, "ddp", **changes))
    names = ("loss", "reward", "critique/sampled", "critique/refined_groups", "critique/rescued_groups")
    same_losses(one, two, names=names)


def endless(folder, first_checkpoint, number):
    """Start two processes of an endless run; the second one gets a signal after a few steps."""
    config = pretraining(folder, 2, "ddp")
    work = command(
        2, "fit", "--config", config, "--trainer.max_steps", 100_000, "--trainer.val_check_interval", 100_000
    )

    def noting(rank):
        output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        work(rank)

    (first, _), (second, _) = start(2, noting)
    deadline = time.monotonic() + SECONDS
    while not (folder / "run" / first_checkpoint).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(second.pid, number)
    for process in (first, second):
        process.join(SECONDS)
        assert process.exitcode is not None
    return first.exitcode, (folder / "0.txt").read_text()


def test_when_a_process_dies_the_others_end_and_the_last_checkpoint_stays(tmp_path):
    status, said = endless(tmp_path / "run", "step=2.ckpt", signal.SIGKILL)
    assert status == 1
    assert "hybridmem: error: another process of this run is gone" in said
    assert load_checkpoint(said.strip().split("--ckpt_path ")[-1])["global_step"] >= 1


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    endless(tmp_path / "run", "step=2.ckpt", signal.SIGTERM)
    saved = load_checkpoint(tmp_path / "run" / "run" / "interrupted.ckpt")
    assert saved["global_step"] >= 2
    assert len(saved["carried"]) == len(saved["random_state"]) == 2  # of both processes


class Unknown(DDPStrategy):
    """Unsupported strategy."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": {"class_path": f"{__name__}.Unknown"}}, "Unknown is not supported; choose auto, ddp"),
        ({"ckpt_path": "sharded"}, "hybridmem consolidate --ckpt_path"),
    ],
)
def test_unsupported_strategies_raise(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sharded").mkdir()
    torch.save({}, tmp_path / "sharded" / "meta.pt")
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", pretraining(tmp_path / "run", **changes))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_unsupported_settings_of_sharded_runs_raise():
    module = PretrainModule(tiny_config(), matrix_optimizer=torch.optim.Muon)
    module._device_mesh = {}  # as the strategy sets it
    with pytest.raises(ValueError, match="set it to null, or trainer"):
        module.configure_model()
    with pytest.raises(ValueError, match="tensor_parallel_size=2 is not supported"):
        shard(tiny_model(), {"tensor_parallel": SimpleNamespace(size=lambda: 2)})


def test_attention_alone_needs_ddp_to_look_for_unused_weights(tmp_path, monkeypatch, capsys):
    changes = {"model__init_args__objectives": [test_policy.ATTENTION]}
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", policy(tmp_path / "run", 1, "ddp", **changes))
    assert "ddp_find_unused_parameters_true" in capsys.readouterr().err.strip().splitlines()[-1]
