"""Rollouts sample from the model's distribution, and scoring reproduces their log-probabilities."""

from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from hybridmem.data.vision import vision_prompt
from hybridmem.rl.attention.exploration import Exploration, cut_noise, draw_noise, explored
from hybridmem.rl.attention.recorder import AttentionRecorder
from hybridmem.rl.attention.targets import TARGETS
from hybridmem.rl.objectives.attention import AttentionRL
from hybridmem.rl.rollouts.prompts import pad_prompts, vision_positions
from hybridmem.rl.rollouts.sampling import Sampling, draw, sample
from hybridmem.rl.rollouts.scoring import completion_logps
from hybridmem.tasks import VisualSearch
from tests.hybridmem.data.vision_models import tiny_processor, write_vision_model
from tests.hybridmem.models import tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1], [8, 2, 8, 1, 8, 2]]
ALIKE = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8], [1, 4, 1, 4, 2, 1, 3, 5, 6, 2]]
SAMPLING = Sampling(max_completion_length=7, temperature=0.8)


def model_of(kind):
    if kind == "llama":
        torch.manual_seed(0)
        shape = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.3)).eval()
    return tiny_model(torch.float32, variant=kind)


def roll_out(model, prompts, seed=0, sampling=SAMPLING, **options):
    batch = pad_prompts(prompts, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    return batch.repeat(4), sample(model, batch, 4, sampling, [7, 11], 0, generator, **options)


def with_lora(model):
    """Return a model with random adapters on all linear layers."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


# Both paths compute the same function: float64 leaves 1e-14. In float32, rounding alone leaves up to 1.6e-5 (mac).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mag", "mac", "mal", "lmm", "swa", "full"])
def test_the_training_path_gives_the_samplers_log_probabilities(kind, adapted, dtype, tolerance):
    model = model_of(kind)
    model = (with_lora(model) if adapted else model).to(dtype)
    prompts, completions = roll_out(model, PROMPTS)
    mask = completions.mask
    for times in (1, 4):
        logps, entropy = completion_logps(model, prompts, completions, SAMPLING.temperature, times)
        assert logps.dtype == completions.sampled_logps.dtype == dtype
        torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=tolerance)
    assert (entropy[mask] > 0).all()
    assert logps.requires_grad


@pytest.mark.parametrize("kind", ["llama", "mag"])
def test_reading_a_prompt_once_or_for_every_response_is_the_same(kind):
    model = model_of(kind)
    _, once = roll_out(model, PROMPTS)
    _, each = roll_out(model, PROMPTS, actions=[Exploration("allocation", {})])
    assert torch.equal(once.ids, each.ids)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[1:2], [[3], [5, 8]], [[3], [5]]], ids=["mixed", "one", "short", "1"]
)
@pytest.mark.parametrize("kind", ["llama", "mag", "mac", "mal", "lmm", "swa", "full"])
def test_responses_learn_the_same_from_one_reading_of_their_prompt(kind, prompts):
    model = model_of(kind).double()
    repeated, completions = roll_out(model, prompts)
    mask, weight = completions.mask, torch.linspace(-1, 1, completions.ids.numel()).view_as(completions.ids)
    found = []
    for times in (1, 4, torch.tensor([3, 1] + [4] * (len(prompts) - 1))):  # a step may contain part of a group
        logps, entropy = completion_logps(model, repeated, completions, SAMPLING.temperature, times)
        found.append((logps[mask], entropy[mask], gradients(model, (logps * weight * mask).sum())))
    tolerance = 1e-5 if kind == "llama" else 1e-10  # Llama's norms are always float32
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positions", ["generated", "predicting"])
@pytest.mark.parametrize(
    ("kind", "target", "sigma"),
    [
        *product(("llama", "swa"), ("attention",), (0.0, 1.5)),
        *product(("mag",), ("allocation", "memory"), (0.0, 1.5)),
        *product(("mac",), TARGETS, (0.0,)),
        ("mac", "memory", 1.5),
        ("mag", "unified", 0.0),
        ("swa", "unified", 0.0),
        ("mal", "memory", 0.0),
        ("lmm", "memory", 0.0),
    ],
)
def test_attention_learns_the_same_from_one_reading_of_a_prompt(kind, target, positions, sigma):
    model, before = model_of(kind).double(), model_of(kind).double()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    objective = AttentionRL(target=target, positions=positions, exploration=sigma, divergence="kl")
    prompts, completions = roll_out(model, ALIKE if kind == "mac" else PROMPTS)
    time = prompts.input_ids.shape[1] + completions.ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    noise = cut_noise(draw_noise(model, target, [1], sigma, 3, 4, time + 2, generator), time) if sigma else None
    found = []
    for times in (1, 4, torch.tensor([3, 1, 4, 4])):
        of_rollout = 1 if sigma else times  # the sampling policy attends with noise
        with torch.no_grad(), AttentionRecorder(before, times=of_rollout) as recorder:
            completion_logps(before, prompts, completions, 1.0, of_rollout)
            old = recorder.records
        with AttentionRecorder(model, times=times) as recorder:
            completion_logps(model, prompts, completions, 1.0, times)
        noise_of = noise if target == "attention" else None
        loss, metrics = objective.compute_loss(recorder.records, old, torch.ones(12), completions.mask, noise_of)
        found.append((loss, metrics, gradients(model, loss)))
    assert found[0][0].abs() > 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_a_response_ends_with_its_end_of_text_or_is_truncated():
    _, completions = roll_out(model_of("full"), PROMPTS, sampling=Sampling(max_completion_length=30))
    for ids, mask, truncated in zip(completions.ids, completions.mask, completions.truncated, strict=True):
        response = ids[mask].tolist()
        assert (response[-1] in (7, 11)) == (not truncated)
        assert not {7, 11} & set(response[:-1])
        assert (ids[~mask] == 0).all()
        assert not truncated or len(response) == 30


@pytest.mark.parametrize("temperature", [-1.0, 1e-30, 5e-7, float("nan"), float("inf")])
def test_temperatures_without_a_distribution_are_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} must be 0 for greedy decoding, or at least 1e-06"):
        Sampling(max_completion_length=1, temperature=temperature)


def test_the_lowest_temperature_samples_the_likeliest_token():
    logits = torch.tensor([[3e4, -3e4, 2e4], [-1e-3, 0.0, -1e-4]])
    tokens, logps = draw(logits, Sampling(max_completion_length=1, temperature=1e-6), None)
    assert tokens.tolist() == [0, 1]
    assert logps.tolist() == [0, 0]


def test_temperature_zero_is_greedy():
    model = model_of("llama")
    _, completions = roll_out(model, PROMPTS[:1], sampling=Sampling(max_completion_length=6, temperature=0.0))
    ids = torch.tensor(PROMPTS[:1])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[7, 11], pad_token_id=0)[0, 10:]
    for row in completions.ids:
        assert torch.equal(row[: len(expected)], expected)


@pytest.mark.parametrize(("filters", "kept"), [(dict(top_k=2), 2), (dict(top_p=0.5), 1), (dict(min_p=0.9), 1)])
def test_filters_leave_the_likeliest_tokens(filters, kept):
    from hybridmem.rl.rollouts.sampling import _filtered

    logps = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    left = _filtered(logps, Sampling(max_completion_length=1, **filters))
    assert int(left.isfinite().sum()) == kept
    assert left[0, 0] == logps[0, 0]


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="max_completion_length=0"):
        Sampling(max_completion_length=0)
    with pytest.raises(ValueError, match="top_p=0"):
        Sampling(max_completion_length=1, top_p=0.0)
    with pytest.raises(ValueError, match="prompt 1 of the batch is empty"):
        pad_prompts([[1], []], 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "target"), [("llama", "attention"), ("swa", "attention"), ("mag", "allocation"), ("mag", "memory")]
)
def test_exploration_in_the_rollout_and_in_the_training_path_is_the_same(kind, target):
    model = model_of(kind)
    before = model(torch.tensor(PROMPTS[:1])).logits
    prompts = pad_prompts(PROMPTS[:2], 0, torch.device("cpu"))
    noise = draw_noise(model, target, [0, 1], 2.0, 2, 4, 17, torch.Generator().manual_seed(0))
    for eps in noise.values():
        torch.testing.assert_close(eps[0::2], -eps[1::2])
    actions = [Exploration(target, noise)]
    completions = sample(model, prompts, 4, SAMPLING, [7], 0, torch.Generator().manual_seed(1), actions)
    logps, _ = completion_logps(model, prompts.repeat(4), completions, SAMPLING.temperature, 4, actions)
    mask = completions.mask
    torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=1e-4)
    plain, _ = completion_logps(model, prompts.repeat(4), completions, SAMPLING.temperature)
    assert (plain - logps)[mask].abs().max() > 0.01
    assert torch.equal(model(torch.tensor(PROMPTS[:1])).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "swa"])
def test_a_noisy_record_gives_the_distribution_that_was_used(kind):
    from hybridmem.rl.attention.distributions import attention
    from hybridmem.rl.attention.exploration import with_noise

    model = model_of(kind)
    ids = torch.tensor(PROMPTS[:1])
    noise = draw_noise(model, "attention", [1], 1.5, 1, 2, 10, torch.Generator().manual_seed(0))
    maps = {}
    with AttentionRecorder(model) as recorder:
        model(ids.repeat(2, 1), use_cache=False)
        record = recorder.records[1]
    record.attention = with_noise(record.attention, noise[1])
    found = attention(record, 10)
    scores = record.attention.q @ record.attention.k.mT * record.attention.scale
    assert scores.shape[1] == 4
    with explored(model, "attention", noise), AttentionRecorder(model) as recorder:
        model(ids.repeat(2, 1), use_cache=False)
        maps = recorder.records[1]
    maps.attention = with_noise(maps.attention, noise[1])
    torch.testing.assert_close(attention(maps, 10), found, rtol=0, atol=1e-5)


def test_undefined_exploration_raises():
    with pytest.raises(ValueError, match="a layer of mac does not support exploration"):
        draw_noise(model_of("mac"), "attention", [1], 1.0, 1, 2, 9, torch.Generator())
    with pytest.raises(ValueError, match="a layer of swa does not support exploration"):
        draw_noise(model_of("swa"), "allocation", [1], 1.0, 1, 2, 9, torch.Generator())


@torch.no_grad()
def test_a_vision_model_reads_its_image_once(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(write_vision_model(tmp_path)).eval()
    processor, task = tiny_processor(), VisualSearch(grid=2)
    asked = [vision_prompt(processor, e["prompt"], e["images"]) for e in (task.example("train", n) for n in range(4))]
    assert len({len(prompt.tokens) for prompt in asked}) > 1  # some are padded
    images, grids = (torch.stack([prompt[field] for prompt in asked]) for field in (1, 2))
    batch = pad_prompts([prompt.tokens for prompt in asked], 256, torch.device("cpu"), images, grids)
    batch = batch._replace(position_ids=vision_positions(model, batch))
    likeliest = sample(model, batch, 1, Sampling(max_completion_length=5, temperature=0.0), [258], 256)
    for row, prompt in enumerate(asked):
        ids = torch.tensor([prompt.tokens])
        inputs = dict(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int())
        inputs |= dict(pixel_values=prompt.images, image_grid_thw=prompt.image_grid_thw[None])
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=258)[0, ids.shape[1] :]
        assert torch.equal(likeliest.ids[row][likeliest.mask[row]], expected)
    completions = sample(model, batch, 3, SAMPLING, [258], 256, torch.Generator().manual_seed(0))
    for num_generations in (1, 3):
        logps, _ = completion_logps(model, batch.repeat(3), completions, SAMPLING.temperature, num_generations)
        mask = completions.mask
        torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=1e-4)
