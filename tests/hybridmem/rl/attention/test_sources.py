"""Units that read beyond their window: KV heads of converted and other models, and mag's gates."""

from contextlib import ExitStack
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem.convert import convert
from hybridmem.rl.attention.allocations import AllocationPolicy, shared
from hybridmem.rl.attention.recorder import AttentionRecorder
from hybridmem.rl.attention.sources import AttentionUnits, GateUnits, HeadUnits, find_units, narrowed, near_keys
from hybridmem.rl.objectives.allocation import AllocationRL
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, sample
from hybridmem.rl.rollouts.scoring import completion_logps
from tests.hybridmem.data.vision_models import vision_model
from tests.hybridmem.models import tiny_model, tokens

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [2, 7, 1, 8, 2, 8, 1, 8]]
SHARE = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 0.3]]])
SAMPLING = Sampling(max_completion_length=6)


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    shape = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.3)).to(dtype).eval()


def test_an_attention_function_agrees_with_the_converted_model():
    model, rows = llama(), tokens(2, 24)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    converted = convert(model, attention_window=5, num_sink_tokens=2).eval()
    units, heads = AttentionUnits(model, 5, 2), HeadUnits(converted, "none")
    with units.applied(model, SHARE), heads.applied(converted, SHARE):
        found = model(rows, attention_mask=mask).logits
        wanted = converted(rows, attention_mask=mask).logits
    torch.testing.assert_close(
        found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-5
    )  # its rotary angles are float32
    assert model.config._attn_implementation == "sdpa"


def test_every_unit_open_is_the_model_itself():
    for model in (llama(), convert(llama()).eval(), tiny_model(variant="mag")):
        units = find_units(model, "none", 5 if model.config.model_type == "llama" else None, None)
        rows, wanted = tokens(2, 24), model(tokens(2, 24)).logits
        share = torch.ones(1, len(units.layers), units.num_heads)
        for given in (share, None):
            with units.applied(model, given):
                torch.testing.assert_close(model(rows).logits, wanted, rtol=0, atol=1e-7)


def test_closed_units_of_mag_read_their_window_alone():
    model = tiny_model(variant="mag", num_hidden_layers=1, attention_window=4)
    units = GateUnits(model)
    rows = tokens(1, 24)
    other = rows.clone()
    other[0, 0] = (other[0, 0] + 1) % 37
    share = torch.zeros(1, 1, units.num_heads)
    with units.applied(model, share):
        logits, changed = (model(x).logits[0, -1] for x in (rows, other))
    torch.testing.assert_close(logits, changed, rtol=0, atol=1e-9)
    assert (model(rows).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-6


def test_near_keys_count_from_the_first_token_behind_padding():
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., :2] = False
    near = near_keys(mask, window=2, sinks=1) & mask
    assert near[0, 0, 7].nonzero().flatten().tolist() == [2, 6, 7]
    assert near[0, 0, 3].nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("prefill", ["full", "allocated"])
@pytest.mark.parametrize("kind", ["converted", "llama", "mag"])
def test_responses_are_scored_as_they_were_sampled(kind, prefill):
    model = {"llama": llama, "mag": lambda: tiny_model(variant="mag")}.get(kind, lambda: convert(llama()).eval())()
    window = None if kind == "mag" else 4
    objective = AllocationRL(prefill=prefill, attention_window=window, num_sink_tokens=1 if window else None)
    policy = Policy(model, MagicMock())
    objective.prepare(policy, MagicMock())
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    action = objective.act(policy, 4, 0, generators)
    assert action.opened[::4].all()
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu"))
    completions = sample(model, prompts, 4, SAMPLING, [7], 0, generators, [action])
    logps, _ = completion_logps(model, prompts.repeat(4), completions, 1.0, 4, [action])
    mask = completions.mask
    torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=1e-5)
    some = torch.tensor([5, 2])
    part = type(completions)(*(x[some] for x in completions))
    rows = prompts.repeat(4).select(some)
    logps_of_some, _ = completion_logps(model, rows, part, 1.0, 1, [action.select(some)])
    torch.testing.assert_close(logps_of_some, logps[some], rtol=0, atol=1e-5)


def test_everything_read_by_the_allocation_is_a_model_with_fixed_sources():
    model = convert(llama(), attention_window=4, num_sink_tokens=1).eval()
    gates, units = AllocationPolicy(2, 2, per_layer=False, initial=0.5), HeadUnits(model, "none")
    opened = torch.tensor([[True, False], [False, False]])
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu"))
    greedy = Sampling(max_completion_length=6, temperature=0.0)
    found = sample(model, prompts, 1, greedy, [7], 0, None, [shared(opened, gates, units)])
    model.set_head_sources([["full", "none"], ["none", "none"]])
    assert torch.equal(found.ids, sample(model, prompts, 1, greedy, [7], 0).ids)


@pytest.mark.parametrize(
    ("model", "source", "window", "message"),
    [
        (llama, "memory", 4, "no memory"),
        (llama, "none", None, "attention_window is not set"),
        (lambda: convert(llama()), "memory", 4, "has no memory: convert"),
        (lambda: tiny_model(variant="mag"), "none", 4, "for converted models"),
        (lambda: tiny_model(variant="swa"), "none", None, "no units to allocate"),
        (lambda: tiny_model(variant="mac"), "none", None, "no gate divides window and memory"),
    ],
)
def test_units_that_a_model_lacks(model, source, window, message):
    with pytest.raises(ValueError, match=message):
        find_units(model(), source, window, None)


def test_memories_fitted_to_another_window_are_refused():
    model = convert(llama(), attention_window=4, num_sink_tokens=1, head_source="memory")
    assert find_units(model, "memory", 4, 1).window_and_sinks == (4, 1)
    with pytest.raises(ValueError, match="fitted to 4 and 1"):
        find_units(model, "memory", 5, None)


@torch.no_grad()
@pytest.mark.parametrize("outside", [False, True])
def test_attention_is_recorded_inside_and_outside_an_allocation(outside):
    model, rows = llama(), tokens(2, 24)
    with AttentionRecorder(model, [0]) as recorder:
        model(rows, use_cache=False)
    wanted = recorder.records[0].attention
    allocated, recorder = AttentionUnits(model, 5, 2).applied(model, SHARE), AttentionRecorder(model, [0])
    with ExitStack() as stack:
        for context in (recorder, allocated) if outside else (allocated, recorder):
            stack.enter_context(context)
        model(rows, use_cache=False)
    torch.testing.assert_close(recorder.records[0].attention.q, wanted.q)
    torch.testing.assert_close(recorder.records[0].attention.k, wanted.k)


@torch.no_grad()
def test_the_image_encoder_of_a_vision_model_is_no_unit():
    model = vision_model().eval()
    image, grid = torch.rand(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
    ids = torch.tensor([[1, 2, *[model.config.image_token_id] * 4, 3, 4, 5, 6]])
    inputs = dict(input_ids=ids, pixel_values=image, image_grid_thw=grid)
    units, whole = find_units(model, "none", 3, 0), model(**inputs).logits
    with units.applied(model, torch.ones(1, 2, 2)):
        torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=1e-5)
    with units.applied(model, torch.zeros(1, 2, 2)):
        assert (model(**inputs).logits - whole).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gates_take_the_window_alone_in_every_precision(dtype):
    logits = torch.tensor([[[-4.0, 4.0, 0.0, 0.0]]], dtype=dtype)
    mixed = narrowed(logits, torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]))
    torch.testing.assert_close(mixed[..., :3], logits[..., :3], rtol=0, atol=1e-5)
    assert float(torch.sigmoid(mixed[0, 0, 3])) > 1 - 1e-6
