"""Hand-written backward passes, compared with autograd, and rotations, compared with their definition."""

import pytest
import torch
import torch.nn.functional as F

from hybridmem.model import functional
from hybridmem.model.functional import block_pairs, causal_convolution, l2_normalize, rms_norm, rotate
from hybridmem.model.sequence import rotary_angles


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 7)])
def test_rms_norm(shape):
    x, weight = randn(*shape), randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, weight.shape, weight, 1e-6))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))


def test_l2_normalize():
    x = randn(3, 4)
    torch.testing.assert_close(l2_normalize(x, eps=0.0), F.normalize(x, dim=-1))
    torch.testing.assert_close(l2_normalize(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.autograd.gradcheck(lambda a: l2_normalize(a, eps=1e-3), (x,))
    zero = torch.zeros(2, 3, requires_grad=True)
    l2_normalize(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("in_cache", [functional.IN_CACHE, 6])  # a block of two rows, and blocks of two tokens
def test_causal_convolution(documents, in_cache, monkeypatch):
    monkeypatch.setattr(functional, "IN_CACHE", in_cache)
    x, weight = randn(2, 9, 3), randn(3, 4)
    same = (torch.rand(2, 6, 4) < 0.6) if documents else None
    taps = x.unfold(1, 4, 1).transpose(2, 3)  # batch, time, kernel, channels
    if documents:
        taps = taps * same[..., None]
    expected = torch.einsum("btkc,ck->btc", taps, weight)
    torch.testing.assert_close(causal_convolution(x, weight, same), expected)
    assert torch.autograd.gradcheck(lambda a, b: causal_convolution(a, b, same), (x, weight))


@pytest.mark.parametrize(("past", "time"), [(0, 8), (0, 9), (2, 7), (4, 5)])
@pytest.mark.parametrize("width", [0, 2])
def test_block_pairs(past, time, width):
    size, (x, front) = 4, (randn(2, 3, past + time, 5), randn(3, width, 5))
    blocks = -(-time // size)
    padded = F.pad(x, (0, 0, size - past, blocks * size - time))
    pairs = padded.unfold(2, 2 * size, size).permute(0, 2, 1, 4, 3)  # batch, blocks, heads, columns, dim
    expected = torch.cat((front.expand(2, blocks, -1, -1, -1), pairs), dim=3).flatten(0, 1)
    torch.testing.assert_close(block_pairs(x, front, size, past), expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda a, b: block_pairs(a, b, size, past), (x, front))


@pytest.mark.parametrize("rotary_dim", [0, 4, 6])
def test_rotation(rotary_dim):
    x, positions = randn(2, 3, 5, 6), torch.arange(5)[None] * 7
    cos, sin = rotary_angles(positions, rotary_dim, 100.0, torch.float64)
    rotated = rotate(x, cos, sin)
    half = rotary_dim // 2
    as_complex = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.complex(cos, sin)
    expected = torch.cat((as_complex.real, as_complex.imag, x[..., rotary_dim:]), dim=-1)
    torch.testing.assert_close(rotated, expected)
    assert torch.autograd.gradcheck(lambda a: rotate(a, cos, sin), (x,))


def test_angles_are_exact_far_out():
    position = 2_000_000
    cos, _ = rotary_angles(torch.tensor([[position]]), 64, 10_000.0, torch.float32)
    first = torch.tensor(float(position), dtype=torch.float64).cos().float()  # channel 0 rotates by the position itself
    torch.testing.assert_close(cos[0, 0, 0, 0], first, rtol=0, atol=1e-6)


def test_autocast_does_not_round_inside():
    x, weight = torch.randn(4, 9, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    taps = torch.randn(16, 4, requires_grad=True)
    cos, sin = rotary_angles(torch.arange(9)[None], 8, 100.0, torch.float32)

    def everything():
        out = rms_norm(x, weight, 1e-6), l2_normalize(x), causal_convolution(x, taps), rotate(x[:, None], cos, sin)
        return *out, *torch.autograd.grad([y.sum() for y in out], (x, weight, taps))

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)
