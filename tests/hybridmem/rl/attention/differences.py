"""Gradients of a policy's expected reward, compared with finite differences."""

import pytest

STEP = 1e-5


def assert_ascends(parameters, gradients, places, expected):
    """Check that a loss's gradients are minus those of an expected reward, at some places of each parameter.

    `places` gives the places of a parameter, and `expected` the reward under the parameters' current values.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in places(parameter):
            sides = []
            for sign in (1, -1):
                parameter.data[place] += sign * STEP
                sides.append(expected().item())
                parameter.data[place] -= sign * STEP
            assert float(gradient[place]) == pytest.approx(-(sides[0] - sides[1]) / (2 * STEP), rel=1e-6, abs=1e-12)
    assert gradients[0].abs().max() > 1e-6
