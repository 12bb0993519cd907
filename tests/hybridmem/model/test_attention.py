"""Windows, segments and persistent tokens under every attention implementation."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache

from hybridmem.model.attention import ShortRangeAttention, Visibility
from hybridmem.model.sequence import TokenSequence, rotary_angles
from tests.hybridmem.models import tiny_config, tiny_model, tokens


def attention(implementation="eager", window=5, **changes):
    config = tiny_config(**changes)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    layer = ShortRangeAttention(config, 0, window).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def sequence(time, past=0, documents=None):
    cos, sin = rotary_angles(past + torch.arange(time)[None], 2, 100.0, torch.float64)
    return TokenSequence(cos, sin, document_ids=documents)


def by_definition(layer, x, documents=None):
    """Compute the softmax over persistent tokens and the document's tokens in the window, token by token."""
    q, k, v, _ = layer.project(x, None, sequence(x.shape[1]))
    k, v = layer.with_persistent(k, v)
    k, v = (y.repeat_interleave(layer.num_key_value_groups, dim=1) for y in (k, v))
    persistent, out = layer.num_persistent, []
    for t in range(x.shape[1]):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        seen = list(range(persistent)) + [persistent + j for j in range(first, t + 1)]
        row = []
        for b in range(len(x)):
            mine = [
                j
                for j in seen
                if j < persistent or documents is None or documents[b, j - persistent] == documents[b, t]
            ]
            weights = (q[b, :, t, None] @ k[b][:, mine].mT * layer.scaling).softmax(-1)
            row.append((weights @ v[b][:, mine])[:, 0].flatten())
        out.append(torch.stack(row))
    return layer.o_proj(torch.stack(out, dim=1))


@settings(max_examples=40, deadline=None)
@given(
    time=st.integers(1, 24),
    window=st.one_of(st.none(), st.integers(1, 30)),
    persistent=st.integers(0, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    implementation=st.sampled_from(["eager", "sdpa"]),
    packed=st.booleans(),
)
@torch.no_grad()
def test_equals_the_definition(time, window, persistent, kv_heads, implementation, packed):
    layer = attention(implementation, window, num_persistent_tokens=persistent, num_key_value_heads=kv_heads)
    x = torch.randn(2, time, 16, dtype=torch.float64)
    documents = (torch.rand(2, time) < 0.2).cumsum(1) if packed else None
    out, _, _ = layer(x, None, sequence(time, documents=documents))
    torch.testing.assert_close(out, by_definition(layer, x, documents), rtol=0, atol=1e-10)


def test_folding_keeps_the_gradients():
    x = torch.randn(2, 23, 16, dtype=torch.float64, requires_grad=True)
    grads = []
    for implementation in ("eager", "sdpa"):
        layer = attention(implementation)
        out, _, _ = layer(x, None, sequence(23))
        grads.append(torch.autograd.grad(out.square().sum(), (x, *layer.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)


def test_folding_never_makes_a_full_map(monkeypatch):
    largest = 0
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, *args, **kwargs):
        nonlocal largest
        largest = max(largest, query.shape[0] * query.shape[2] * key.shape[2])
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    layer, time = attention("sdpa", window=8), 1024
    layer(torch.randn(1, time, 16, dtype=torch.float64), None, sequence(time))
    assert largest == time * (2 * 8 + 2)


def test_the_state_holds_the_visible_keys_only():
    layer = attention(window=5)
    _, state, _ = layer(torch.randn(1, 20, 16, dtype=torch.float64), None, sequence(20))
    assert state.keys.shape[2] == 4
    assert state.keys.untyped_storage().nbytes() == state.keys.numel() * 8  # not a view of all twenty keys


def test_visibility_as_a_mask():
    visible = Visibility(torch.arange(3) + 1, torch.arange(4), num_persistent=1, window=2)
    expected = [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert visible.dense[0, 0].int().tolist() == expected


def flash_as_eager(module, query, key, value, attention_mask, sliding_window=None, scaling=None, **_):
    """Emulate FlashAttention on a CPU: causal from the end, with a window and a key mask for padding."""
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = (distance >= 0) & ((distance < sliding_window) if sliding_window else True)
    seen = seen[None, None].expand(len(query), 1, -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@torch.no_grad()
@pytest.mark.parametrize(("variant", "persistent"), [("swa", 0), ("full", 2), ("mag", 0), ("mal", 0)])
def test_flash_attention_is_asked_for_the_same(variant, persistent, monkeypatch):
    model, ids = tiny_model(variant=variant, num_persistent_tokens=persistent), tokens()
    expected = model(ids).logits
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_as_eager)
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([9, 1, 30], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-10)
    if not persistent:
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[0, 6:]
        model.config._attn_implementation = "sdpa"
        torch.testing.assert_close(padded, model(ids[:1, 6:]).logits[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "documents", "message"),
    [
        (dict(variant="swa"), None, "cannot keep persistent tokens in a sliding window"),
        (dict(variant="swa", num_persistent_tokens=0), torch.arange(40).expand(2, -1) // 9, "rows of one document"),
        (dict(variant="mac"), None, "mac"),
    ],
)
def test_unsupported_uses_of_flash_attention_raise(changes, documents, message, monkeypatch):
    model, ids = tiny_model(**changes), tokens()
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_as_eager)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=message):
        model(ids, document_ids=documents)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention compiles C++ on the CPU: there is no g++")
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("variant", ["swa", "full", "mac"])
def test_flex_attention_equals_sdpa(variant):
    model, ids = tiny_model(torch.float32, variant=variant, head_dim=16), tokens()
    documents = torch.arange(40).expand(2, -1) // 15
    expected = model(ids).logits, model(ids, document_ids=documents).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(model(ids, document_ids=documents).logits, expected[1], rtol=0, atol=1e-4)
