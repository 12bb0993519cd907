"""Weights outside a mask stay bit-identical in both kinds of training, and unsuitable masks raise errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridmem import HybridMemForCausalLM
from hybridmem.training.checkpoints.contents import load_policy
from tests.hybridmem.training.policy.test_module import write_config as by_reward
from tests.hybridmem.training.runs import hybridmem, weights
from tests.hybridmem.training.runs import write_config as pretraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
DECAY = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.3}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01}}


def checkpoints(every):
    settings = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": every}
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": settings}


def masked(path):
    return {"class_path": "hybridmem.training.SubnetworkMask", "init_args": {"mask": str(path)}}


def write_mask(path, state, share=0.3):
    """Write a random mask of a share of the entries, empty in the first tensor."""
    torch.manual_seed(1)
    masks = {name: torch.rand(tensor.shape) < share for name, tensor in state.items()}
    first = next(iter(masks))
    masks[first] = torch.zeros_like(masks[first])
    save_file(masks, path)
    return masks


def config_of(folder, kind, mask, **changes):
    folder.mkdir(exist_ok=True)
    callbacks = [masked(mask), checkpoints(2)] if mask else [checkpoints(2)]
    changes = dict(trainer__callbacks=callbacks, model__init_args__optimizer=DECAY) | changes
    return (by_reward if kind == "reward" else pretraining)(folder, **changes)


def assert_trained_within(masks, before, after):
    moved = 0
    for name, mask in masks.items():
        old, new = before[name], after[f"model.{name}"]
        assert torch.equal(new[~mask], old[~mask]), name
        moved += (new != old).sum().item()
    assert moved > 0.5 * sum(mask.sum().item() for mask in masks.values())


def start_of(folder, monkeypatch, kind):
    """Return a run's initial weights, from a run without learning or from the policy's folder."""
    if kind == "reward":
        by_reward(folder)
        return HybridMemForCausalLM.from_pretrained(folder / "policy").state_dict()
    still = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    config = config_of(folder / "still", kind, None, model__init_args__optimizer=still)
    hybridmem(monkeypatch, "fit", "--config", config)
    state = weights(folder / "still" / "run" / "step=2.ckpt")
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def entries_with_momentum(checkpoint):
    """Return the number of entries for which AdamW has seen a gradient."""
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    return sum(state["exp_avg"].count_nonzero().item() for state in optimizer["state"].values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pretraining", {}),
        ("pretraining", dict(model__init_args__matrix_optimizer=MUON)),
        ("reward", {}),
    ],
    ids=["pretraining", "muon", "reward"],
)
def test_only_the_subnetwork_moves_and_resuming_is_exact(tmp_path, monkeypatch, kind, changes):
    start = start_of(tmp_path, monkeypatch, kind)
    masks = write_mask(tmp_path / "mask.safetensors", start)
    whole = config_of(tmp_path / "whole", kind, tmp_path / "mask.safetensors", **changes)
    hybridmem(monkeypatch, "fit", "--config", whole)
    ended = weights(tmp_path / "whole" / "run" / "step=6.ckpt")
    assert_trained_within(masks, start, ended)
    if not changes:  # frozen entries do not count in the gradient norm either
        named = sum(mask.sum().item() for mask in masks.values())
        assert 0 < entries_with_momentum(tmp_path / "whole" / "run" / "step=6.ckpt") <= named

    again = config_of(tmp_path / "again", kind, tmp_path / "mask.safetensors", **changes)
    middle = tmp_path / "whole" / "run" / "step=4.ckpt"
    hybridmem(monkeypatch, "fit", "--config", again, "--ckpt_path", middle)
    resumed = weights(tmp_path / "again" / "run" / "step=6.ckpt")
    assert all(torch.equal(resumed[name], ended[name]) for name in ended)


def test_a_mask_of_everything_changes_nothing(tmp_path, monkeypatch):
    write_mask(tmp_path / "mask.safetensors", start_of(tmp_path, monkeypatch, "reward"))
    everything = {name: torch.ones_like(mask) for name, mask in load_file(tmp_path / "mask.safetensors").items()}
    save_file(everything, tmp_path / "mask.safetensors")
    ends = []
    for name, mask in (("free", None), ("masked", tmp_path / "mask.safetensors")):
        hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path / name, "reward", mask))
        ends.append(weights(tmp_path / name / "run" / "step=6.ckpt"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_mask_of_a_run_trains_the_next_one(tmp_path, monkeypatch, capsys):
    """A mask computed from one run's checkpoints restricts another run to the entries that the first one updated."""
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path / "full", "reward", None))
    full = tmp_path / "full"
    hybridmem(monkeypatch, "export", "--ckpt_path", full / "run" / "step=6.ckpt", "--output", full / "trained")
    mask = tmp_path / "mask.safetensors"
    hybridmem(monkeypatch, "subnetwork", full / "policy", full / "trained", "--save_mask", mask)
    assert "wrote" in capsys.readouterr().out
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path / "small", "reward", mask))
    start = load_policy(str(full / "policy")).state_dict()
    assert_trained_within(load_file(mask), start, weights(tmp_path / "small" / "run" / "step=6.ckpt"))


def other_names(masks):
    return {f"x.{name}": mask for name, mask in masks.items()}


def other_shapes(masks):
    return {name: torch.ones(1, dtype=torch.bool) for name in masks}


def numbers(masks):
    return {name: mask.float() for name, mask in masks.items()}


def nothing(masks):
    return {name: torch.zeros_like(mask) for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_names, "belongs to another model: the mask lacks"),
        (other_shapes, "belongs to another model: model.embed_tokens.weight has shape [1] there and [259, 16] here"),
        (numbers, "has dtype F32 for"),
        (nothing, "selects no weight, so nothing would be trained"),
        (None, "does not exist: give a Hugging Face folder or a safetensors file"),
    ],
)
def test_masks_that_do_not_match_stop_before_training(tmp_path, monkeypatch, capsys, change, message):
    path = tmp_path / "mask.safetensors"
    if change is not None:
        by_reward(tmp_path)
        state = HybridMemForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
        save_file(change(write_mask(path, state)), path)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path / "run", "reward", path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hybridmem: error: ")
    assert message in error
