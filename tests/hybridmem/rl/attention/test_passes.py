"""Attention functions in place of a model's own."""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridmem.rl.attention.passes import IMPLEMENTATION, attending_with
from tests.hybridmem.models import tokens

from .test_sources import llama


@torch.no_grad()
def test_an_inner_function_replaces_an_outer_one_inside_its_context():
    model, rows, calls = llama(), tokens(1, 6), []

    def noting(name):
        def attend(*args, **options):
            calls.append((name, args[4].shape))
            return sdpa_attention_forward(*args, **options)

        return attend

    wanted = model(rows).logits
    with attending_with(model, noting("outer")):
        model(rows)
        with attending_with(model, noting("inner")):
            found = model(rows).logits
        model(rows)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert [name for name, _ in calls] == ["outer"] * 2 + ["inner"] * 2 + ["outer"] * 2
    assert {shape for _, shape in calls} == {(1, 1, 6, 6)}  # a mask although the rows are causal
    assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS.get(IMPLEMENTATION) is None
