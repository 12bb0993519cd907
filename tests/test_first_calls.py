import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from hybridmem.model.functional import rms_norm
from tests.first_calls import start_test


def test_each_test_checks_the_first_calls_and_some_later_ones():
    @jaxtyping.jaxtyped(typechecker=beartype)
    def rows(x: Float[Tensor, "time dim"]) -> int:
        return len(x)

    def checked_calls() -> list[int]:
        found = []
        for call in range(1, 20):
            try:
                rows(torch.zeros(3))
            except TypeCheckError:
                found.append(call)
        return found

    assert checked_calls() == [1, 2, 3, 4, 8, 16]
    start_test()
    assert checked_calls() == [1, 2, 3, 4, 8, 16]


def test_functions_of_the_package_are_checked():
    with pytest.raises(TypeCheckError, match="rms_norm"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6)
