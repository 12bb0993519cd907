"""Tiny Qwen vision-language model with its processor."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from hybridmem.data.tokenizer import byte_tokenizer

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with Qwen's image tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


def vision_model() -> Qwen2_5_VLForConditionalGeneration:
    """Return a model for the vocabulary of `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    start, end, image, video = tokenizer.convert_tokens_to_ids(MARKS)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(hidden_size=16, depth=1, num_heads=2, out_hidden_size=32, intermediate_size=16)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def write_vision_model(folder: Path) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder."""
    vision_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_processor(*_: object) -> Qwen2_5_VLProcessor:
    """Return Qwen's processor without its video part, which needs torchvision."""
    processor = object.__new__(Qwen2_5_VLProcessor)
    processor.tokenizer, processor.chat_template = tiny_tokenizer(), CHAT
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    processor.image_token, processor.video_token = MARKS[2:]
    processor.image_token_id, processor.video_token_id = processor.tokenizer.convert_tokens_to_ids(MARKS[2:])
    return processor


def different_tokens(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: object
) -> list[float]:
    """Return a reward that varies among responses of an untrained model."""
    return [float(sum(ids) % 7) for ids in completion_ids]
