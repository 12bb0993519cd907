"""Non-finite logits raise an error with the layer that causes them."""

import pytest
import torch

from hybridmem.rl.rollouts.multi_turn import Reply, sample_turns
from hybridmem.rl.rollouts.non_finite import NonFiniteLogits
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, draw, sample
from tests.hybridmem.models import tiny_model

PROMPTS = pad_prompts([[1, 2, 3], [4]], 0, torch.device("cpu"))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_is_refused(spoilt, temperature):
    logits = torch.zeros(3, 5)
    logits[1, 2] = spoilt
    with pytest.raises(NonFiniteLogits, match="non-finite"):
        draw(logits, Sampling(max_completion_length=1, temperature=temperature), None)
    with pytest.raises(NonFiniteLogits):
        draw(torch.full((1, 5), -torch.inf), Sampling(max_completion_length=1, temperature=temperature), None)


def test_a_masked_vocabulary_is_sampled_from():
    logits = torch.full((4, 5), -torch.inf)
    logits[:, 3] = 0.5
    tokens, logps = draw(logits, Sampling(max_completion_length=1), torch.Generator())
    assert tokens.tolist() == [3] * 4
    assert logps.tolist() == [0] * 4


@pytest.mark.parametrize("variant", ["swa", "mag", "mac", "lmm"])
def test_the_layer_is_named(variant):
    model = tiny_model(torch.float32, variant=variant).eval()
    with torch.no_grad():
        next(model.model.layers[1].parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteLogits, match=r"first in the output of model\.layers\.1"):
        sample(model, PROMPTS, 2, Sampling(max_completion_length=3), [0], 0)
    assert not any(module._forward_hooks for module in model.modules() if not hasattr(module, "config"))


def test_many_turns_name_it_too():
    model = tiny_model(torch.float32, variant="mag").eval()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf

    def respond(number: int, tokens: list[int]) -> Reply:
        return Reply([1], failed=False, ended=False)

    with pytest.raises(NonFiniteLogits, match="first in the output of lm_head"):
        sample_turns(model, PROMPTS, 2, Sampling(max_completion_length=5), 3, respond, [0], 0)
