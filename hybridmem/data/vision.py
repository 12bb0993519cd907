"""Prompts with pictures, formatted by a vision-language model's processor."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from hybridmem.rl.rollouts.prompts import Prompt

SCALE = 7  # magnification of pixels; a patch of 8 × 8 pixels then fills four of Qwen's image tokens


@cache
def load_processor(name_or_path: str) -> Any:
    """Load a processor from a folder or the Hugging Face hub.

    Raises:
        ValueError: The processor cannot be loaded, accepts no images or has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot load processor={name_or_path!r} ({reason}); set it to the folder or name of a vision model"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"processor={name_or_path!r} accepts no images; set tokenizer instead")
    if processor.chat_template is None:
        raise ValueError(
            f"processor={name_or_path!r} has no chat template, which places a prompt's image; use an instruct model"
        )
    return processor


def picture(patches: Float[Tensor, "patches pixels"]) -> Image.Image:
    """Assemble square grey patches in [0, 1], in row-major order, to one square picture.

    Raises:
        ValueError: The patches, or their pixels, do not fill a square.
    """
    side, size = round(len(patches) ** 0.5), round(patches.shape[1] ** 0.5)
    if side**2 != len(patches) or size**2 != patches.shape[1]:
        raise ValueError(f"images have shape {tuple(patches.shape)}; both dimensions must be square numbers")
    grey = patches.view(side, side, size, size).transpose(1, 2).reshape(side * size, side * size)
    pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((side * size * SCALE,) * 2, Image.Resampling.NEAREST).convert("RGB")


def vision_prompt(processor: Any, text: str, patches: Float[Tensor, "patches pixels"] | None) -> Prompt:
    """Return the prompt of a user message with an optional picture before its text."""
    content: list[dict[str, str]] = [{"type": "text", "text": text}]
    images = None
    if patches is not None:
        content.insert(0, {"type": "image"})
        images = [picture(patches)]
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    made = processor(text=[turn], images=images, return_tensors="pt")
    grid = None if patches is None else made["image_grid_thw"][0]
    return Prompt(made["input_ids"][0].tolist(), made.get("pixel_values"), grid)
