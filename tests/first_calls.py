"""Shape checks of every function's first calls in each test.

A check costs more than a call on tiny tensors, and a test that decodes token by token repeats the same calls thousands
of times. Each test therefore checks a function's calls 1, 2, 3, 4, 8, 16, 32 and so on.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

FIRST = 4
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_test = 0


def start_test() -> None:
    """Count the calls of all functions from zero again."""
    global _test
    _test += 1


def limited(jaxtyped: Callable[..., Decorator]) -> Callable[..., Decorator]:
    """Return jaxtyping's decorator, limited to the first calls of functions; new dataclasses are always checked."""

    def with_typechecker(**options: Any) -> Decorator:
        check = jaxtyped(**options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            return check(function) if inspect.isclass(function) else _choose(function, check(function))

        return decorate

    return with_typechecker


def _choose(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    test = calls = 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls
        __tracebackhide__ = True
        if test != _test:
            test, calls = _test, 0
        calls += 1
        if calls > FIRST and calls & (calls - 1):  # not a power of two
            return function(*args, **kwargs)
        return checked(*args, **kwargs)

    return call
