"""PEFT's LoRA on every linear layer: training, saving, loading, disabling and merging."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.hybridmem.models import FOLDERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("variant", FOLDERS)
def test_lora_on_all_linear_layers(variant, exported, tmp_path):
    folder = exported(variant)
    ids = torch.randint(0, 256, (2, 20))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    before = plain(ids).logits.detach()
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    adapted = {name.split(".")[-1] for name in model.targeted_module_names}
    linear = {name.split(".")[-1] for name, part in plain.named_modules() if type(part) is torch.nn.Linear}
    assert {"gate_proj", "up_proj", "down_proj"} < adapted
    assert "lm_head" not in adapted
    assert "base_layer" in linear  # wrapped by an adapter

    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval()
    with torch.no_grad():
        after = model(ids).logits
        assert not torch.allclose(after, before, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, before)
        settings = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        generated = model.generate(input_ids=ids, **settings)

        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(ids).logits, after)

        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, after, rtol=0, atol=1e-4)
        assert torch.equal(merged.generate(ids, **settings), generated)
