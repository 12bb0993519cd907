"""Memory as heads: every source, compared with its definition, in any split, packed and padded."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.model.cache import state_bytes
from hybridmem.model.heads import HeadMixer
from hybridmem.model.memory import pick
from hybridmem.model.sequence import TokenSequence, rotary_angles
from hybridmem_kernels import memory_mlp_scan, memory_scan, use_backend
from tests.hybridmem.models import tiny_config, tiny_model, tokens

SOURCES = ("full", "memory", "none")
WINDOW, SINKS = 7, 2


def mixer(sources, window=WINDOW, sinks=SINKS, implementation="sdpa", dtype=torch.float64, **changes):
    config = tiny_config(
        num_hidden_layers=1,
        variant="mah",
        head_sources=[list(sources)],
        num_key_value_heads=len(sources),
        attention_window=window,
        num_sink_tokens=sinks,
        **changes,
    )
    config._attn_implementation = implementation
    torch.manual_seed(0)
    layer = HeadMixer(config, 0).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def sequence(time, documents=None, dim=2):
    cos, sin = rotary_angles(torch.arange(time)[None], dim, 100.0, torch.float64)
    return TokenSequence(cos, sin, document_ids=documents)


def by_definition(layer, x, sources, documents=None):
    """Compute each head token by token: softmax over visible tokens, and a memory of the tokens beyond the window."""
    config, order = layer.config, sequence(x.shape[1])
    tokens_ = layer.project(x, order)
    window, sinks, groups = config.attention_window, config.num_sink_tokens, layer.num_key_value_groups
    documents = torch.zeros(x.shape[:2], dtype=torch.long) if documents is None else documents
    out = torch.zeros(*x.shape[:2], layer.heads, layer.head_dim, dtype=x.dtype)
    for b in range(len(x)):
        for document in documents[b].unique():
            place = (documents[b] == document).nonzero()[:, 0]
            for head in range(layer.heads):
                kv = head // groups
                q, k, v = tokens_.q[b, head, place], tokens_.k[b, kv, place], tokens_.v[b, kv, place]
                scores = q @ k.T * layer.scaling
                t, j = torch.arange(len(place))[:, None], torch.arange(len(place))
                seen = j <= t
                if sources[kv] != "full":
                    seen = seen & ((t - j < window) | (j < sinks))
                scores = scores.masked_fill(~seen, -torch.inf)
                own = scores.softmax(-1) @ v
                if sources[kv] == "memory" and len(place) > window + sinks:
                    raw = tokens_.raw_q[b, head, place], tokens_.raw_k[b, kv, place]
                    far = recall(layer.memory, x[b, place], head, *raw, v, window, sinks)
                    gate = layer.memory.mixing_gate(x[b, place])[:, head]
                    share = torch.sigmoid(gate + layer.memory.window_mass[head] * scores.logsumexp(-1))[:, None]
                    mixed = share * own + (1 - share) * far
                    own = torch.where(t - window >= sinks, mixed, own)
                out[b, place, head] = own
    return layer.o_proj(out.flatten(-2))


def recall(memory, x, head, q, k, v, window, sinks):
    """Read a memory in which token j is written when token j + window is read, and sinks are never written."""
    unit = lambda y: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    q, k = unit(q @ memory.q_map.weight[head]), unit(k @ memory.k_map.weight[head])
    config, eta = memory.config, torch.sigmoid(memory.eta_logit[head])
    alpha, write = torch.sigmoid(memory.gate_proj(x)).chunk(2, dim=-1)
    theta = write[:, head] * (2 * (1 - eta) ** 2 / (1 + eta)).clamp(max=1) / config.memory_depth
    first, steps = window + sinks, len(x) - window - sinks
    written = slice(sinks, sinks + steps)
    inputs = (q[first:], k[written], v[written])
    gates = (alpha[written, head], eta.expand(steps), theta[written])
    arguments = [y[None, None] for y in (*inputs, *gates)]
    if config.memory_depth == 1:
        out, _ = memory_scan(*arguments, backend="reference")
    else:
        weights = [w[head : head + 1] for w in memory.initial_weights]
        options = dict(chunk_size=config.memory_chunk_size, max_grad_norm=config.memory_max_grad_norm)
        out, _ = memory_mlp_scan(*arguments, weights, backend="reference", **options)
    return torch.cat((torch.zeros(first, out.shape[-1], dtype=out.dtype), out[0, 0]))


@settings(max_examples=60, deadline=None)
@given(
    time=st.integers(1, 40),
    sources=st.lists(st.sampled_from(SOURCES), min_size=1, max_size=1).flatmap(
        lambda one: st.sampled_from([one * 1, [*one, "full"], [*one, "memory", "none", "full"], ["memory", *one]])
    ),
    window=st.integers(1, 12),
    sinks=st.integers(0, 4),
    depth=st.integers(1, 2),
    implementation=st.sampled_from(["eager", "sdpa"]),
    packed=st.booleans(),
)
@torch.no_grad()
def test_equals_the_definition(time, sources, window, sinks, depth, implementation, packed):
    layer = mixer(sources, window, sinks, implementation, memory_depth=depth)
    x = torch.randn(2, time, 16, dtype=torch.float64)
    documents = (torch.rand(2, time) < 0.1).cumsum(1) if packed else None
    out, _, _ = layer(x, None, sequence(time, documents))
    torch.testing.assert_close(out, by_definition(layer, x, sources, documents), rtol=0, atol=1e-10)


def test_all_full_is_the_full_variant():
    """Variants `full` and `mah` give equal logits with equal weights."""
    full = tiny_model(variant="full", num_persistent_tokens=0)
    heads = tiny_model(variant="mah")
    weights = dict(full.state_dict())
    for name in list(weights):
        if "attention." in name:
            weight = weights.pop(name)
            if "qkv_proj" in name:
                for part, piece in zip("qkv", weight.split((24, 12, 12)), strict=True):
                    weights[name.replace("attention.qkv_proj", f"{part}_proj")] = piece
            else:
                weights[name.replace("attention.", "")] = weight
    heads.load_state_dict(weights)
    torch.testing.assert_close(heads(tokens()).logits, full(tokens()).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_short_texts_read_no_memory():
    """Every source equals full attention if all tokens are sinks or in the window."""
    ids = tokens(time=WINDOW + SINKS)
    model = tiny_model(variant="mah", head_sources=[["memory"] * 2] * 2, num_sink_tokens=SINKS)
    logits = {}
    for source in SOURCES:
        with model.head_sources([[source] * 2] * 2):
            logits[source] = model(ids).logits
    torch.testing.assert_close(logits["memory"], logits["full"], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits["none"], logits["full"], rtol=0, atol=1e-12)


@torch.no_grad()
def test_training_starts_near_the_window():
    torch.manual_seed(0)
    model = HybridMemForCausalLM(
        tiny_config(variant="mah", head_sources=[["memory"] * 2] * 2, num_sink_tokens=SINKS)
    ).double()
    memory = model.model.layers[0].mixer.memory
    torch.testing.assert_close(memory.q_map.weight, torch.eye(6, dtype=torch.float64).expand(4, 6, 6))
    assert (torch.sigmoid(memory.mixing_gate(torch.randn(3, 16, dtype=torch.float64))) > 0.95).all()
    with model.head_sources([["none"] * 2] * 2):
        window = model(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, window, rtol=0, atol=0.1)


def gradients(model, ids, pieces, weights, **rows):
    """Return the gradients of a sum of logits, computed in pieces whose states carry gradients."""
    cache, total = DynamicCache(config=model.config), 0.0
    cut = {name: row.split(pieces, dim=1) for name, row in rows.items()}
    for n, (piece, weight) in enumerate(zip(ids.split(pieces, dim=1), weights.split(pieces, dim=1), strict=True)):
        arguments = {name: parts[n] for name, parts in cut.items()}
        logits = model(piece, past_key_values=cache, use_cache=True, **arguments).logits
        total = total + (logits * weight).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total, parameters, allow_unused=True)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rows", ["alone", "packed", "padded"])
def test_gradients_do_not_depend_on_the_split(depth, rows):
    sources = [["memory", "full"], ["none", "memory"]]
    model = tiny_model(variant="mah", head_sources=sources, memory_depth=depth, num_sink_tokens=SINKS)
    ids, arguments = tokens(time=34), {}
    weights = torch.randn(2, 34, 37, dtype=torch.float64)
    if rows == "packed":
        arguments["document_ids"] = torch.tensor([[0] * 20 + [1] * 14, [0] * 3 + [1] * 31])
    elif rows == "padded":
        documents = torch.zeros_like(ids)
        documents[0, :5] = -1
        arguments["document_ids"], weights = documents, weights * (documents >= 0)[..., None]
    whole = gradients(model, ids, [34], weights, **arguments)
    for pieces in ([9, 1, 1, 13, 10], [1] * 34):
        for one, other in zip(whole, gradients(model, ids, pieces, weights, **arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@torch.no_grad()
def test_only_full_heads_let_the_cache_grow():
    sizes = {}
    for source in SOURCES:
        model = tiny_model(torch.float32, variant="mah", head_sources=[[source] * 2] * 2)
        cache, sizes[source] = DynamicCache(config=model.config), []
        for piece in tokens(time=120).split(30, dim=1):
            model(piece, past_key_values=cache, use_cache=True)
            sizes[source].append(state_bytes(cache))
    assert sizes["none"][0] == sizes["none"][-1]
    assert sizes["memory"][0] == sizes["memory"][-1]
    assert sizes["full"][-1] > 3 * sizes["full"][0]


@torch.no_grad()
def test_scores_of_none_heads_grow_with_the_window():
    """No attention call sees a map over the whole text."""
    layer, seen = mixer(["none", "memory"]), []
    layer._call = lambda *arguments, call=layer._call: seen.append(arguments[2].shape) or call(*arguments)
    layer(torch.randn(1, 70, 16, dtype=torch.float64), None, sequence(70))
    assert [shape[2] for shape in seen] == [2 * WINDOW + SINKS]


@torch.no_grad()
@pytest.mark.parametrize("alternative", ["none", "memory"])
def test_shares_choose_for_every_row(alternative):
    base = [[alternative] * 2] * 2
    model = tiny_model(variant="mah", head_sources=base, num_sink_tokens=SINKS)
    ids, share = tokens(batch=3), torch.randint(0, 2, (3, 2, 2), generator=torch.Generator().manual_seed(0)).double()
    with model.head_sources(full_share=share):
        mixed = model(ids).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([11, 1, 28], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixed, rtol=0, atol=1e-10)
    for row in range(3):
        sources = [["full" if open_ else alternative for open_ in layer] for layer in share[row].bool().tolist()]
        with model.head_sources(sources):
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_prompt_read_in_full_is_continued_by_the_allocation():
    """A cache filled under one allocation continues under another, row by row."""
    model = tiny_model(variant="mah", head_sources=[["none", "memory"]] * 2, num_sink_tokens=SINKS)
    prompt, rest = tokens(batch=1, time=20), tokens(batch=2, time=5, seed=3)
    cache = DynamicCache(config=model.config)
    with model.head_sources(full_share=torch.ones(1, 2, 2, dtype=torch.float64)):
        model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    share = torch.stack((torch.ones(2, 2), torch.zeros(2, 2))).double()
    with model.head_sources(full_share=share):
        logits = model(rest, past_key_values=cache).logits
    with model.head_sources([["full"] * 2] * 2):
        whole = model(torch.cat((prompt, rest[:1]), dim=1)).logits[0, 20:]
    torch.testing.assert_close(logits[0], whole, rtol=0, atol=1e-10)
    assert not torch.allclose(logits[1], logits[0])


def test_soft_shares_have_gradients():
    model = tiny_model(variant="mah", head_sources=[["none"] * 2] * 2, num_sink_tokens=SINKS)
    share = torch.full((1, 2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    with model.head_sources(full_share=share):
        model(tokens(), labels=tokens()).loss.backward()
    assert (share.grad != 0).all()


def test_sources_are_those_of_the_forward_pass_under_checkpointing():
    """The recomputed forward pass of activation checkpointing runs outside the context."""
    grads = []
    for checkpointed in (False, True):
        model = tiny_model(variant="mah", head_sources=[["memory"] * 2] * 2, num_sink_tokens=SINKS).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        with model.head_sources([["none", "full"]] * 2):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@torch.no_grad()
def test_sources_that_were_set_are_saved(tmp_path):
    model = tiny_model(variant="mah", head_sources=[["memory"] * 2] * 2)
    chosen = [["memory", "full"], ["none", "none"]]
    model.set_head_sources(chosen)
    model.save_pretrained(tmp_path)
    loaded = HybridMemForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.head_sources == chosen
    assert loaded.model.layers[1].mixer.memory is None
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_triton_agrees_with_torch():
    pytest.importorskip("triton")
    layer = mixer(["memory"], dtype=torch.float32, head_dim=16, memory_chunk_size=16)
    x = torch.randn(1, 33, 16)
    order = TokenSequence(*(y.float() for y in sequence(33).angles))
    expected, _, _ = layer(x, None, order)
    with use_backend("triton"):
        found, _, _ = layer(x, None, TokenSequence(order.cos, order.sin))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention compiles C++ on the CPU: there is no g++")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    ids = tokens(time=30)
    logits = []
    for name in ("eager", implementation):
        model = tiny_model(
            torch.float32, variant="mah", head_sources=[["full", "none"], ["memory", "none"]], head_dim=16
        )
        model.set_attn_implementation(name)
        logits.append(model(ids, document_ids=torch.tensor([[0] * 12 + [1] * 18, [0] * 30])).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_eager_gives_weights_of_full_heads():
    model = tiny_model(variant="mah")
    model.set_attn_implementation("eager")
    maps = model(tokens(), output_attentions=True).attentions
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))


BROKEN = {
    "names 1 layers": [["full", "full"]],
    r"head_sources\[1\] names 1 sources but num_key_value_heads=2": [["full", "full"], ["full"]],
    r"head_sources\[0\]\[1\]='most' is unknown; choose one of full, memory, none": [["full", "most"], ["full", "full"]],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_sources_are_named(message):
    model = tiny_model(variant="mah")
    with pytest.raises(Exception, match=message):
        tiny_config(variant="mah", head_sources=BROKEN[message])
    with pytest.raises(ValueError, match=message):
        model.set_head_sources(BROKEN[message])


def test_sources_belong_to_mah():
    with pytest.raises(Exception, match="the layer is mag, not mah"):
        tiny_config(layer_types=["mah", "mag"], head_sources=[["full", "full"], ["full", "full"]])
    assert tiny_config(layer_types=["mah", "mag"]).head_sources == [["full", "full"], []]
    assert HybridMemConfig().head_sources is None


def test_a_memory_that_is_not_there_is_named():
    model = tiny_model(variant="mah")
    with model.head_sources([["memory", "full"]] * 2), pytest.raises(ValueError, match="built without one"):
        model(tokens())


def test_caches_of_other_sources_are_refused():
    model, cache = tiny_model(variant="mah"), None
    cache = model(tokens(), use_cache=True).past_key_values
    model.set_head_sources([["none", "full"]] * 2)
    with pytest.raises(ValueError, match="start with an empty cache"):
        model(tokens(), past_key_values=cache)


def test_shares_of_the_wrong_shape_are_named():
    model = tiny_model(variant="mah")
    with (
        pytest.raises(ValueError, match=r"full_share must be .*got \(2, 2, 3\)"),
        model.head_sources(full_share=torch.ones(2, 2, 3)),
    ):
        pass
    with model.head_sources(full_share=torch.ones(3, 2, 2)), pytest.raises(ValueError, match="3 rows for a batch of 2"):
        model(tokens())


@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 2], [3, 0, 1], [2], []])
def test_pick(wanted):
    x = torch.arange(8).view(1, 4, 2)
    assert pick(x, wanted).equal(x[:, wanted])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_states_are_loaded_as_plain_data(tmp_path, padded):
    """Checkpoints with carried states load with weights_only, and named states keep their types."""
    model, ids = tiny_model(variant="mah", head_sources=[["full", "memory"], ["none", "memory"]]), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 1 - padded
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    torch.save([layer.state for layer in cache.layers], tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt", weights_only=True)
    expected = model(ids[:, :3], past_key_values=cache).logits
    again = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=again)
    for layer, state in zip(again.layers, loaded, strict=True):
        layer.state = state
    assert model(ids[:, :3], past_key_values=again).logits.equal(expected)


def choosing(layer, x, writes, sizes=None):
    """Return the output and the memory of a layer that skips tokens, over parts of a text."""
    outputs, state, start = [], None, 0
    for size in sizes or (x.shape[1],):
        cos, sin = (y[:, :, start : start + size] for y in sequence(x.shape[1]).angles)
        tokens_ = TokenSequence(
            cos, sin, past=start, writes=None if writes is None else writes[:, start : start + size]
        )
        out, state, _ = layer(x[:, start : start + size], state, tokens_)
        outputs.append(out)
        start += size
    return torch.cat(outputs, dim=1), state.memory


@torch.no_grad()
def test_skipped_tokens_leave_the_memory_as_if_they_had_never_left_the_window():
    layer, x = mixer(["memory", "memory"]), torch.randn(2, 24, 16, dtype=torch.float64)
    writes = (torch.rand(24, generator=torch.Generator().manual_seed(0)) < 0.5).expand(2, -1)
    _, memory = choosing(layer, x, writes)
    left = torch.arange(24)[SINKS : 24 - WINDOW][writes[0, SINKS : 24 - WINDOW]]
    assert 2 < len(left) < 12
    project, heads = layer.project(x, sequence(24)), list(range(layer.heads))
    repeat = lambda y: y[:, :, left].repeat_interleave(layer.num_key_value_groups, dim=1)  # noqa: E731
    k = layer.memory.k_map(repeat(project.raw_k), heads)
    gates = layer.memory.gates(x, heads)[:, :, left].unbind(-1)
    torch.testing.assert_close(memory.scan, memory_scan(k, k, repeat(project.v), *gates)[1])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(5, 11, 8), (1,) * 24], ids=["chunks", "one by one"])
def test_skipped_tokens_in_any_split(sizes):
    layer, x = mixer(["memory", "none", "full", "memory"]), torch.randn(2, 24, 16, dtype=torch.float64)
    writes = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted, memory = choosing(layer, x, writes)
    found, again = choosing(layer, x, writes, sizes)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(again, memory)


@torch.no_grad()
def test_a_memory_that_stores_every_token_or_none():
    layer, x = mixer(["memory", "memory"]), torch.randn(2, 24, 16, dtype=torch.float64)
    everything = torch.ones(2, 24, dtype=torch.bool)
    torch.testing.assert_close(choosing(layer, x, everything)[0], choosing(layer, x, None)[0])
    window = mixer(["none", "none"])
    window.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(choosing(layer, x, ~everything)[0], window(x, None, sequence(24))[0])
