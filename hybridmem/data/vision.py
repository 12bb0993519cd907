"""Questions about pictures as a vision-language model's own processor writes them."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from hybridmem.rl.rollouts.prompts import Prompt

SCALE = 7  # a pixel is drawn as 7 × 7: a patch of 8 × 8 pixels fills four of Qwen's image tokens


@cache
def load_processor(name_or_path: str) -> Any:
    """The processor that transformers finds in a folder or on the Hugging Face hub.

    Raises:
        ValueError: there is none, it takes no images, or it has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"processor={name_or_path!r} cannot be loaded: name the folder or model of a vision-language model "
            f"({reason})"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"processor={name_or_path!r} takes no images: set tokenizer instead")
    if processor.chat_template is None:
        raise ValueError(f"processor={name_or_path!r} has no chat template, which says where a prompt's image stands")
    return processor


def picture(patches: Float[Tensor, "patches pixels"]) -> Image.Image:
    """Square patches of grey, in [0, 1], row by row, as one square picture.

    Raises:
        ValueError: patches that fill no square.
    """
    side, size = round(len(patches) ** 0.5), round(patches.shape[1] ** 0.5)
    if side**2 != len(patches) or size**2 != patches.shape[1]:
        raise ValueError(f"images are {tuple(patches.shape)}: neither patches nor their pixels fill a square")
    grey = patches.view(side, side, size, size).transpose(1, 2).reshape(side * size, side * size)
    pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((side * size * SCALE,) * 2, Image.Resampling.NEAREST).convert("RGB")


def vision_prompt(processor: Any, text: str, patches: Float[Tensor, "patches pixels"] | None) -> Prompt:
    """A user's turn, with a picture before its text where there is one, up to where the model answers."""
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
