import pytest
import torch
import torch.nn.functional as F

from hybridmem.convert import convert
from hybridmem.convert.memories import add_memories
from hybridmem.training.retrofit_losses import (
    beyond_window,
    every_source,
    kl_to_base,
    nats_beyond,
    read,
    regress_heads,
    relative_errors,
    with_gradients,
)
from tests.hybridmem.convert.bases import base_model, texts

WINDOW, SINKS = 7, 2
MIXED = [["memory", "full"], ["none", "memory"]]


def model_and_batch(sources="memory", dtype=torch.float64):
    """Return a converted model with large memory weights, and a batch with one document per row."""
    model = convert(base_model(dtype=dtype), attention_window=WINDOW, num_sink_tokens=SINKS)
    model.requires_grad_(False)
    add_memories(model, sources)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    ids = texts(2, 40)
    return model, {"input_ids": ids, "document_ids": torch.zeros_like(ids)}


def memory_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".memory." in name}


def test_beyond_the_window():
    documents = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 2, [3] * 13])
    beyond = beyond_window(documents, 4)
    assert beyond.tolist() == [[False] * 4 + [True] * 2 + [False] * 4 + [True] + [False] * 2, [False] * 4 + [True] * 9]


@pytest.mark.parametrize("sources", ["memory", MIXED])
def test_gradients_equal_those_of_the_layers_alone(sources):
    model, batch = model_and_batch(sources)
    beyond = beyond_window(batch["document_ids"], WINDOW + SINKS)
    fit = regress_heads(model, batch, beyond)

    inputs, outputs = {}, {}
    handles = []
    for n, layer in enumerate(model.model.layers):
        mixer = layer.mixer
        handles.append(mixer.register_forward_pre_hook(lambda _, given, n=n: inputs.update({n: given})))
        handles.append(mixer.o_proj.register_forward_pre_hook(lambda _, given, n=n: outputs.update({n: given[0]})))
    with torch.no_grad():
        read(model, batch, every_source(model, "full"))
    for handle in handles:
        handle.remove()
    errors = []
    for n, layer in enumerate(model.model.layers):
        x, _, sequence = inputs[n]
        sequence.heads = None
        sequence.memo = {}
        own = layer.mixer.mix(x, None, sequence)[0]
        full = outputs[n].unflatten(-1, (4, -1))
        for head in range(4):
            if model.config.head_sources[n][head // 2] == "memory":
                difference = (own - full)[beyond][:, head].square().sum()
                errors.append(difference / full[beyond][:, head].square().sum())
    torch.testing.assert_close(fit.errors, torch.stack(errors).detach().float(), rtol=1e-5, atol=1e-6)
    torch.stack(errors).mean().backward()
    for name, parameter in memory_parameters(model).items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = fit.gradients.get(parameter, torch.zeros_like(parameter))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_only_memories_get_gradients():
    model, batch = model_and_batch(MIXED)
    parameters = list(memory_parameters(model).values())
    beyond = beyond_window(batch["document_ids"], WINDOW + SINKS)
    fit = regress_heads(model, batch, beyond)
    assert set(fit.gradients) <= set(parameters)
    with_gradients(fit.errors.mean(), fit.gradients, parameters).mul(3).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".memory." in name), name
        if parameter in fit.gradients:
            torch.testing.assert_close(parameter.grad, 3 * fit.gradients[parameter])
    assert not [hook for layer in model.model.layers for hook in layer.mixer._forward_hooks]


def test_documents_and_padding_keep_apart():
    model, batch = model_and_batch()
    ids = torch.cat((batch["input_ids"][:1], batch["input_ids"][1:]), dim=1)
    documents = torch.cat((torch.zeros(1, 40), torch.ones(1, 40)), dim=1).long()
    padded = {"input_ids": F.pad(ids, (0, 5)), "document_ids": F.pad(documents, (0, 5), value=-1)}
    alone = regress_heads(model, batch, beyond_window(batch["document_ids"], WINDOW + SINKS))
    together = regress_heads(model, padded, beyond_window(padded["document_ids"], WINDOW + SINKS))
    torch.testing.assert_close(alone.errors, together.errors, rtol=1e-5, atol=1e-6)
    for parameter, gradient in alone.gradients.items():
        torch.testing.assert_close(together.gradients[parameter], gradient, rtol=1e-4, atol=1e-7)


def test_rows_without_tokens_beyond_give_zeros():
    model, batch = model_and_batch()
    short = {name: x[:, :5] for name, x in batch.items()}
    fit = regress_heads(model, short, beyond_window(short["document_ids"], WINDOW + SINKS))
    assert fit.errors.tolist() == [0.0] * 8
    assert all(not gradient.any() for gradient in fit.gradients.values())


def test_relative_errors_by_hand():
    target = torch.tensor([3.0, 4.0]).expand(1, 2, 1, 2, 2)
    mixed = target.clone()
    mixed[0, 1, 0, 1] = torch.tensor([3.0, 3.0])
    every = torch.ones(1, 2, dtype=torch.bool)
    assert relative_errors(mixed, target, [0], every).tolist() == pytest.approx([0, 1 / 50])
    assert relative_errors(mixed, target, [0], torch.tensor([[False, True]])).tolist() == pytest.approx([0, 1 / 25])


def test_the_teacher_is_the_base_model():
    model, batch = model_and_batch()
    hidden = read(model, batch, every_source(model, "full"))
    wanted = base_model().model(batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)  # transformers' norms use float32
    assert model.config.head_sources == [["memory"] * 2] * 2


def test_kl_and_nats_by_hand():
    model, batch = model_and_batch()
    own, base = read(model, batch, None).flatten(0, 1), read(model, batch, every_source(model, "full")).flatten(0, 1)
    logs, wanted = model.lm_head(own).log_softmax(-1), model.lm_head(base).log_softmax(-1)
    expected = (wanted.exp() * (wanted - logs)).sum()
    torch.testing.assert_close(kl_to_base(model, own, base), expected.float(), rtol=1e-4, atol=1e-5)
    assert kl_to_base(model, own, own).abs() < 1e-4

    labels = texts(2, 40, seed=5)
    counted = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    nats = nats_beyond(model, own.view(2, 40, -1), labels, counted)
    expected = -logs.view(2, 40, -1).gather(2, labels[..., None])[..., 0][counted]
    torch.testing.assert_close(nats, expected.float(), rtol=1e-4, atol=1e-5)
    assert nats_beyond(model, own.view(2, 40, -1), labels, counted & False).shape == (0,)
