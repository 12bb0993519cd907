"""Dropout is disabled in reinforcement learning, however it is configured."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hybridmem.rl.rollouts.policy import disable_dropout
from tests.hybridmem.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT
SHAPE = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def policies():
    """Return models with dropout as an attribute, as a module, or in an adapter."""
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2))
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lora = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    ours = tiny_model(torch.float32, variant="mag", attention_dropout=0.5)
    return {"llama": llama, "gpt2": gpt2, "lora": lora, "ours": ours}


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "ours"])
@pytest.mark.parametrize("training", [False, True])
def test_passes_agree_in_either_mode(name, training):
    model = policies()[name].train()
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        disable_dropout(model)
        assert not model.training
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(model.train(training)(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_skipped_layers_are_disabled_too():
    config = OPTConfig(
        vocab_size=37, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    config.layerdrop, config.dropout = 0.9, 0.0
    model = OPTForCausalLM(config).train()
    assert disable_dropout(model)
    assert model.model.decoder.layerdrop == 0


def test_checkpointed_layers_stay_in_training_mode():
    model = tiny_model(torch.float32, variant="mag")
    model.activation_checkpointing_enable()
    disable_dropout(model)
    assert model.training
