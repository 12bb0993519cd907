"""accelerate's device maps, with layers on the CPU and layers loaded from disk on demand."""

import pytest
import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM

from tests.hybridmem.models import VARIANTS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.arange(32, 64)[None]
SETTINGS = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device_map", ["auto", ON_DISK], ids=["auto", "disk"])
def test_a_device_map_changes_no_number(device_map, variant, exported, tmp_path):
    if (variant, device_map) == ("mac", ON_DISK):
        pytest.skip("mac's layers go to the disk as a whole, below")
    expected = AutoModelForCausalLM.from_pretrained(exported(variant))
    placed = AutoModelForCausalLM.from_pretrained(exported(variant), device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(placed(IDS).logits, expected(IDS).logits)
    assert torch.equal(placed.generate(IDS, **SETTINGS), expected.generate(IDS, **SETTINGS))


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(variant="mac"), dict(variant="mag", memory_depth=2)], ids=str)
def test_layers_that_need_all_their_weights_are_offloaded_whole(changes, tmp_path):
    model = tiny_model(torch.float32, vocab_size=64, **changes)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "model")
    pieces = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(ValueError, match="preload_module_classes"):
        pieces(IDS)
    disk_offload(model, tmp_path / "whole", preload_module_classes=["HybridMemLayer"])
    assert next(model.parameters()).is_meta
    assert torch.equal(model(IDS).logits, expected)
