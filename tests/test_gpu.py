"""Models, streams, generation and reinforcement learning on a GPU, compared with a CPU.

    TRITON_INTERPRET=0 python -m pytest tests/test_gpu.py --numprocesses 8

hybridmem_kernels.tools.gpu_check checks the Triton operators alone.
"""

import os

import pytest
import torch
from transformers import DynamicCache

from hybridmem.rl import AttentionRecorder
from hybridmem.rl.attention.distributions import distribution
from hybridmem.rl.attention.targets import TARGETS
from tests.hybridmem.models import KINDS, tiny_model, tokens
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

from .test_configs import ROOT, for_every_warm_up, learn_by_reward

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1", reason="needs a GPU, TRITON_INTERPRET=0"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
SHAPE = dict(memory_head_dim=16, memory_chunk_size=16)  # the smallest sizes that the Triton kernels support
RUN = {"trainer.accelerator": "gpu"} | {f"model.init_args.config.{name}": size for name, size in SHAPE.items()}
WRITTEN = {name.replace(".", "__"): value for name, value in RUN.items()}  # keyword arguments of write_config
# Tolerance of float32 sums in another order, over two layers and a recurrence.
CLOSE = dict(rtol=1e-3, atol=1e-3)


def loss_and_gradients(model, ids):
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: x.grad.double().cpu() for name, x in model.named_parameters() if x.grad is not None}
    return loss.detach().double().cpu(), gradients


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_a_cpu(kind):
    ids = tokens(time=150)
    expected, slopes = loss_and_gradients(tiny_model(**KINDS[kind], **SHAPE), ids)
    loss, found = loss_and_gradients(tiny_model(torch.float32, **KINDS[kind], **SHAPE).cuda(), ids.cuda())
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert (found[name] - slope).norm() <= 1e-3 * slope.norm() + 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_logits_of_one_forward(kind):
    model, ids = tiny_model(torch.float32, **KINDS[kind], **SHAPE).cuda(), tokens(time=60).cuda()
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([30, 1, 1, 28], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_are_those_of_a_cpu(kind):
    ids, settings = tokens(time=13), dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tiny_model(**KINDS[kind], **SHAPE).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    model = tiny_model(torch.float32, **KINDS[kind], **SHAPE).cuda()
    found = model.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **settings)
    assert torch.equal(found.cpu(), expected)


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_records_equal_a_cpu(variant, target):
    def policy(device, dtype):
        model = tiny_model(dtype, variant=variant, **SHAPE).to(device)
        with AttentionRecorder(model) as recorder:
            model(tokens().to(device), use_cache=False)
        (record,) = recorder.records.values()
        return distribution(record, target, 12).double().cpu()

    torch.testing.assert_close(policy("cuda", torch.float32), policy("cpu", torch.float64), **CLOSE)


@for_every_warm_up
def test_training_by_reward_continues_its_warm_up(path, tmp_path, monkeypatch):
    run = learn_by_reward(path, tmp_path, monkeypatch, RUN, {"trainer.accelerator": "gpu"})
    assert (run / "last.ckpt").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_training_by_reward_in_16_bits(precision, tmp_path, monkeypatch):
    warm_up = ROOT / "configs" / "rl" / "recall_warmup.yaml"
    later = {"trainer.accelerator": "gpu", "trainer.precision": precision}
    run = learn_by_reward(warm_up, tmp_path, monkeypatch, RUN | later, later)
    assert all(x.isfinite().all() for x in weights(run / "last.ckpt").values())


def test_resumed_runs_have_the_numbers_of_uninterrupted_ones(tmp_path, monkeypatch):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    for folder in (whole, rest):
        folder.mkdir()
    hybridmem(monkeypatch, "fit", "--config", write_config(whole, **WRITTEN))
    middle = whole / "run" / "step=3.ckpt"
    hybridmem(monkeypatch, "fit", "--config", write_config(rest, **WRITTEN), "--ckpt_path", middle)
    assert logged(rest, "train/loss") == pytest.approx(logged(whole, "train/loss")[3:], rel=1e-3)


def test_a_checkpoint_is_read_on_a_cpu(tmp_path, monkeypatch):
    config = write_config(tmp_path, **WRITTEN)
    hybridmem(monkeypatch, "fit", "--config", config)
    last = tmp_path / "run" / "step=6.ckpt"
    hybridmem(monkeypatch, "validate", "--config", config, "--ckpt_path", last, "--trainer.accelerator", "cpu")
    hybridmem(monkeypatch, "export", "--ckpt_path", last, "--output", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
