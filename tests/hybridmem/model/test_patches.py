"""Patch embeddings: their scale, their place codes and their position in the row."""

import pytest
import torch

from hybridmem.model.patches import embed_patches, embed_with_patches, patch_projection, place_codes


def embedding(hidden_size=96):
    torch.manual_seed(0)
    module = torch.nn.Embedding(50, hidden_size)
    torch.nn.init.normal_(module.weight, std=0.02)
    return module


def test_the_projection_keeps_distances_and_is_always_the_same():
    projection = patch_projection(64, 96)
    torch.testing.assert_close(projection @ projection.T, torch.eye(64))
    patch_projection.cache_clear()
    assert torch.equal(patch_projection(64, 96), projection)


def test_patches_are_about_as_long_as_tokens():
    module = embedding()
    patches = embed_patches(torch.rand(2, 9, 64), module)
    tokens = module.weight.norm(dim=-1).mean()
    torch.testing.assert_close(patches.norm(dim=-1), tokens.expand(2, 9), rtol=0.2, atol=0)


@pytest.mark.parametrize("patches", [1, 9, 10])
def test_every_place_has_a_code_of_its_own(patches):
    codes = place_codes(patches, 96)
    assert codes.isfinite().all()
    assert torch.pdist(codes).gt(0.1).all()


def test_brightness_and_contrast_do_not_matter_but_the_place_does():
    module, image = embedding(), torch.rand(1, 1, 64).expand(1, 4, 64)
    patches = embed_patches(image, module)
    torch.testing.assert_close(embed_patches(0.1 + 0.5 * image, module), patches, rtol=1e-3, atol=1e-5)
    assert torch.pdist(patches[0]).gt(0.01).all()


def test_a_blank_patch_is_its_place():
    assert embed_patches(torch.zeros(1, 4, 64), embedding()).isfinite().all()


def test_patches_take_the_first_places_after_the_padding():
    module, images = embedding(), torch.rand(2, 3, 64)
    ids = torch.tensor([[0, 0, 0, 4, 5, 6], [9, 0, 0, 0, 7, 8]])
    mask = torch.tensor([[True] * 6, [False] + [True] * 5])
    rows, patches = embed_with_patches(images, ids, mask, module), embed_patches(images, module)
    assert torch.equal(rows[0], torch.cat((patches[0], module(ids[0, 3:]))))
    assert torch.equal(rows[1], torch.cat((module(ids[1, :1]), patches[1], module(ids[1, 4:]))))
    assert torch.equal(embed_with_patches(images, ids, None, module)[1, :3], patches[1])


def test_a_narrow_model_raises():
    with pytest.raises(ValueError, match="hidden_size=32 must be at least 64"):
        embed_patches(torch.rand(1, 9, 64), embedding(32))
