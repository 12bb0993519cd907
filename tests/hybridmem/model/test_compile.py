"""Whole models under torch.compile: a single graph and equal numbers."""

import pytest
import torch
from torch import Tensor, nn

from tests.hybridmem.models import KINDS, VARIANTS, tiny_model, tokens
from tests.unchecked import passes_without_shape_checks, with_shape_checks, without_shape_checks

TIME = 15  # two windows, three segments and two chunks, all partial
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 2 + [2] * 7, [0] * TIME])
PADDING = torch.ones(2, TIME, dtype=torch.long)
PADDING[0, :4] = 0
INSIDE = torch.ones(2, TIME, dtype=torch.long)
INSIDE[0, 3:7] = 0


@with_shape_checks
@pytest.mark.slow
def test_in_a_process_without_shape_checks():
    passes_without_shape_checks(__file__)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def loss_and_gradients(model: nn.Module, call: nn.Module, **inputs) -> list[Tensor]:
    input_ids = tokens(time=TIME)
    mask = inputs.get("attention_mask", torch.ones_like(input_ids))
    output = call(input_ids, labels=input_ids.masked_fill(mask == 0, -100), use_cache=False, **inputs)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()), materialize_grads=True)
    return [output.loss, output.logits * mask[..., None], *gradients]


def equals_eager(model: nn.Module, *cases: dict, tolerance: float = 1e-10, **how) -> None:
    compiled = torch.compile(model, **how)
    for inputs in cases or ({},):
        expected = loss_and_gradients(model, model, **inputs)
        got = loss_and_gradients(model, compiled, **inputs)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


def one_layer(kind: str, **changes):
    settings = dict(KINDS[kind])
    settings["num_hidden_layers"] = len(settings.get("layer_types") or [0])
    for name in settings.keys() & {"head_sources", "sliding_windows"}:
        settings[name] = settings[name][: settings["num_hidden_layers"]]
    return tiny_model(**settings, **changes)


@without_shape_checks
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("mixed", "mal depth 2", "lmm depth 2", "mag depth 3")])
def test_every_variant_is_one_graph(kind):
    equals_eager(one_layer(kind), fullgraph=True, backend="aot_eager")


@without_shape_checks
@pytest.mark.parametrize(
    "cases",
    [[dict(document_ids=DOCUMENTS)], [dict(attention_mask=PADDING), dict(attention_mask=INSIDE)]],
    ids=["documents", "padding in front and inside"],
)
@pytest.mark.parametrize(
    "kind", ["mag", "lmm depth 2", "with attention_conv", "mah", "mah depth 2", "mah like a base model"]
)
def test_documents_and_padding_are_in_the_graph(kind, cases):
    equals_eager(one_layer(kind), *cases, fullgraph=True, backend="aot_eager")


@without_shape_checks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from Dynamo, at a graph break
def test_packed_segments_break_the_graph_and_not_the_numbers():
    """The number of segments depends on the data, so the graph breaks."""
    model = one_layer("mac")
    equals_eager(model, dict(document_ids=DOCUMENTS), backend="aot_eager")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(time=TIME), document_ids=DOCUMENTS)


@without_shape_checks
@pytest.mark.parametrize("kind", ["mag", "full", "mah", "mah like a base model"])
def test_streaming_goes_on_from_a_cache(kind):
    model, input_ids = one_layer(kind), tokens(time=TIME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(input_ids[:, :9], use_cache=True)
        second = compiled(input_ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
        expected = model(input_ids).logits
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), expected, rtol=0, atol=1e-10)


@without_shape_checks
@torch.no_grad()
@pytest.mark.parametrize("kind", ["mac", "mag", "mah"])
def test_decoding_steps(kind):
    model, input_ids = one_layer(kind), tokens(time=TIME)
    # The end of a segment depends on mac's state, so the graph breaks there.
    step = torch.compile(model, fullgraph=kind != "mac", backend="aot_eager")
    cache = model(input_ids[:, :11]).past_key_values
    steps = [step(token, past_key_values=cache, use_cache=True).logits for token in input_ids[:, 11:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids).logits[:, 11:], rtol=0, atol=1e-10)


@without_shape_checks
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_exports(variant):
    model, input_ids = one_layer(variant), tokens(time=TIME)
    program = torch.export.export(model, (input_ids.flip(1),), dict(use_cache=False), strict=False).module()
    got = program(input_ids, use_cache=False).logits
    torch.testing.assert_close(got, model(input_ids).logits, rtol=0, atol=1e-10)


@without_shape_checks
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from Inductor
def test_inductor_fuses_what_is_left():
    equals_eager(one_layer("mag", dtype=torch.float32), tolerance=2e-4, fullgraph=True)
