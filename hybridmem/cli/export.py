"""`hybridmem export`: export of a checkpoint's model as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from hybridmem.convert import Allocation, allocate, convert
from hybridmem.convert.conversion import ALLOCATION
from hybridmem.convert.memories import route_writes
from hybridmem.data.tokenizer import load_tokenizer
from hybridmem.data.vision import load_processor
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.training.checkpoints.contents import model_of_checkpoint
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.checkpoints.model_card import model_card

from .hub import open_repository, upload


def export(
    ckpt_path: Path,
    output: Path,
    license: str | None = None,
    allocation: Path | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write a Hugging Face folder with a checkpoint's weights, configuration, tokenizer, model code and model card.

    Memories that no head reads are left out. A router of writes that the checkpoint learned becomes part of the model.

    Args:
        ckpt_path: checkpoint of `hybridmem fit`; its averaged weights (EMA) are exported if it has any.
        output: folder to write.
        license: licence of the weights for the model card, a hub identifier such as apache-2.0.
        allocation: file of head sources to apply. None: the allocation that the checkpoint learned, if any.
        push_to_hub: name of a model repository on the Hugging Face hub to upload the folder to, such as me/my_model.
    """
    output.mkdir(parents=True, exist_ok=True)  # fails before the long computation if the folder is not writable
    if push_to_hub is not None:
        open_repository(push_to_hub)
    checkpoint = load_checkpoint(ckpt_path)
    tokenizer = load_tokenizer(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    model = model_of_checkpoint(checkpoint)
    fixed = _allocation_of(checkpoint) if allocation is None else Allocation.load(allocation)
    if fixed is not None:
        model = _with_sources(model, fixed)
        fixed.save(output / ALLOCATION)
    if "write_router" in checkpoint:
        route_writes(model, **checkpoint["write_router"])
    if tokenizer is not None:
        ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        model.config.update(ends | dict(pad_token_id=tokenizer.pad_token_id))
        model.generation_config.update(**ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output)
    if checkpoint.get("processor"):
        load_processor(checkpoint["processor"]).save_pretrained(output)
    elif tokenizer is not None:
        tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(model.config, checkpoint, license, push_to_hub))
    print(f"wrote {output}")
    if push_to_hub is not None:
        print(f"uploaded {upload(output, push_to_hub)}")


def _allocation_of(checkpoint: dict[str, Any]) -> Allocation | None:
    """Return the allocation in a checkpoint, or None if training learned none."""
    values = checkpoint.get("allocation")
    return None if values is None else Allocation.from_dict(values)


def _with_sources(model: Any, allocation: Allocation) -> HybridMemForCausalLM:
    """Fix the sources of a model's heads, converting a transformers model first."""
    if not isinstance(model, HybridMemForCausalLM):
        return convert(model, allocation=allocation)
    allocate(model, allocation)
    return model
