"""The effective span of distributions whose span is known."""

import torch

from hybridmem.metrics import EffectiveSpan, entropy


def test_even_and_pointed_attention():
    even, pointed = torch.full((1, 2, 1, 8), 1 / 8), torch.zeros(1, 2, 1, 8)
    pointed[..., 3] = 1
    metric = EffectiveSpan()
    metric.update(torch.cat((even, pointed), dim=2))
    torch.testing.assert_close(metric.compute().item(), (8 + 1) / 2)
    metric.reset()
    metric.update(torch.cat((even, pointed), dim=2), torch.tensor([[True, False]]))
    torch.testing.assert_close(metric.compute().item(), 8.0)


def test_heads_are_averaged_first():
    heads = torch.eye(2)[None, :, None]  # two heads, each on a token of its own
    metric = EffectiveSpan()
    metric.update(heads)
    torch.testing.assert_close(metric.compute().item(), 2.0)


def test_entropy_of_certainty_is_0_with_gradient():
    p = torch.tensor([1.0, 0.0], requires_grad=True)
    assert entropy(p).item() == 0
