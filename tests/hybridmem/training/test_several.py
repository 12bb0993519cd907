"""Several processes train as one does: the same losses and weights, checkpoints that go on in either."""

import pytest
import torch

from hybridmem.training.checkpoints import load_checkpoint

from ..several import fit
from . import test_policy
from .runs import hybridmem, logged, weights, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
}
TWO = {"trainer__devices": 2, "data__init_args__batch_size": 2}
STRATEGIES = {"ddp": "ddp", "sharded": SHARDED}
QUICK = {"trainer__enable_progress_bar": False}


def pretraining(folder, processes=1, strategy="auto", **changes):
    """A configuration with a batch of four rows over all processes."""
    folder.mkdir()
    settings = dict(trainer__strategy=strategy, trainer__devices=processes, data__init_args__batch_size=4 // processes)
    return write_config(folder, **QUICK, **settings, **changes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_pretrain_as_one_does(tmp_path, monkeypatch, strategy):
    hybridmem(monkeypatch, "fit", "--config", pretraining(tmp_path / "one"))
    fit(2, "--config", pretraining(tmp_path / "two", 2, STRATEGIES[strategy]))
    for name in ("train/loss", "train/bits_per_byte", "val/bits_per_byte"):
        one, two = (logged(tmp_path / run, name) for run in ("one", "two"))
        assert len(one) > 1
        assert two == pytest.approx(one, abs=1e-5), name
