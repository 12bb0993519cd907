"""Conversion of pictures and questions to inputs of a vision-language model."""

import pytest
import torch

from hybridmem.data import TaskDataModule, vision
from hybridmem.data.vision import SCALE, load_processor, picture, vision_prompt
from hybridmem.tasks import VisualSearch

from .vision_models import tiny_processor, tiny_tokenizer

IMAGE = tiny_tokenizer().convert_tokens_to_ids("<|image_pad|>")


def test_patches_are_drawn_row_by_row():
    patches = torch.zeros(4, 64)
    patches[1] = 1.0  # first row, second column
    patches[2, 0] = 0.5  # second row, first column, its first pixel
    image = picture(patches)
    side = 8 * SCALE
    assert image.size == (2 * side, 2 * side)
    assert image.getpixel((2 * side - 1, 0)) == (255, 255, 255)
    assert image.getpixel((0, 0)) == image.getpixel((side, side)) == (0, 0, 0)
    assert image.getpixel((SCALE - 1, side + SCALE - 1)) == (128, 128, 128)


def test_patches_must_fill_a_square():
    with pytest.raises(ValueError, match=r"images have shape \(3, 64\)"):
        picture(torch.zeros(3, 64))


def test_a_prompt_has_a_place_for_every_image_token_and_ends_with_the_question():
    example = VisualSearch(grid=2).example("train", 0)
    prompt = vision_prompt(tiny_processor(), example["prompt"], example["images"])
    assert prompt.image_grid_thw.tolist() == [1, 8, 8]  # 112 pixels per side, patches of 14
    assert prompt.images.shape[0] == 64
    assert prompt.tokens.count(IMAGE) == 16  # four patches are merged into a token
    assert bytes(prompt.tokens[-len(example["prompt"]) :]).decode() == example["prompt"]


def test_a_question_without_a_picture():
    prompt = vision_prompt(tiny_processor(), "why?", None)
    assert bytes(prompt.tokens).decode() == "why?"
    assert prompt.images is prompt.image_grid_thw is None


def test_the_data_module_asks_through_the_processor(monkeypatch):
    monkeypatch.setattr("hybridmem.data.task_module.load_processor", tiny_processor)
    data = TaskDataModule(VisualSearch(grid=2), mode="prompts", processor="somewhere")
    data.setup("fit")
    assert data.vocab_size == len(tiny_tokenizer())
    assert data.prompt(data.task.example("val", 1)).tokens.count(IMAGE) == 16


def test_settings_that_cannot_work(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="set mode to prompts"):
        TaskDataModule(VisualSearch(grid=2), processor="somewhere")
    load_processor.cache_clear()
    with pytest.raises(ValueError, match=r"cannot load processor="):
        load_processor(str(tmp_path))
    for missing, message in (("image_processor", "accepts no images"), ("chat_template", "no chat template")):
        processor = tiny_processor()
        setattr(processor, missing, None)
        monkeypatch.setattr(vision.AutoProcessor, "from_pretrained", lambda _, found=processor: found)
        load_processor.cache_clear()
        with pytest.raises(ValueError, match=message):
            load_processor("somewhere")
    load_processor.cache_clear()
