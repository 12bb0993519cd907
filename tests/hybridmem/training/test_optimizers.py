"""Weight decay by parameter, and two optimisers combined into one."""

from copy import deepcopy
from functools import partial

import torch
from torch.optim import SGD, AdamW

from hybridmem.training import MatrixOptimizer, WarmupCosine, decay_groups
from tests.hybridmem.models import tiny_model, tokens


def test_matrices_decay_and_the_rest_does_not():
    model = tiny_model(torch.float32, attention_conv=True)
    decayed, others = (group["params"] for group in decay_groups(model))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    for parameter in decayed:
        assert names[id(parameter)].endswith(("proj.weight", "gate.weight", "head.weight", "persistent_tokens"))
    for parameter in others:
        assert "norm" in names[id(parameter)] or names[id(parameter)].endswith(
            ("bias", "embed_tokens.weight", "convolution.weight", "eta_logit")
        )


def train(model, optimizer, steps, scheduler=None):
    for seed in range(steps):
        ids = tokens(seed=seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def test_matrix_optimizer_trains_all_and_resumes():
    def build():
        model = tiny_model(torch.float32).train()
        muon = partial(torch.optim.Muon, lr=0.02, weight_decay=0.1)
        optimizer = MatrixOptimizer(model, muon, partial(AdamW, lr=1e-2))
        return model, optimizer, WarmupCosine(optimizer, total_steps=10, warmup_steps=2)

    model, optimizer, scheduler = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, 3, scheduler)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    again, other, other_scheduler = build()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    other_scheduler.load_state_dict(scheduler.state_dict())
    for part in ((model, optimizer, scheduler), (again, other, other_scheduler)):
        train(*part[:2], 2, part[2])
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_is_in_one_group():
    model = tiny_model(torch.float32, variant="mac", memory_depth=2)
    optimizer = MatrixOptimizer(model, partial(SGD, lr=1.0), partial(SGD, lr=0.5))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # like a scheduler
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 1)
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
