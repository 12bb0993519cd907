"""The blocked inverse, compared with a dense one, also where a Neumann series would overflow."""

import pytest
import torch

from hybridmem_kernels.triangular import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 7, 8, 16, 23, 24, 64, 128])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_inverts(size, scale):
    strict = (torch.rand(5, size, size, dtype=torch.float64) * scale).tril(-1)
    identity = torch.eye(size, dtype=torch.float64)
    product = unit_lower_inverse(strict) @ (strict + identity)
    torch.testing.assert_close(product, identity.expand_as(product), rtol=0, atol=1e-10)


def test_repeated_keys_stay_accurate_in_float32():
    strict = torch.ones(1, 64, 64).tril(-1)  # the same key, written 64 times at full strength
    expected = torch.eye(64) - torch.diag(torch.ones(63), -1)
    torch.testing.assert_close(unit_lower_inverse(strict)[0], expected, rtol=0, atol=1e-6)
