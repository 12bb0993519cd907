"""Triton's interpreter without two steps that have no effect and take more than half of its time.

Every call of a device function replaces the functions of `triton.language`, as the kernel's launch already did. Integer
arithmetic is repeated to detect overflow, but the result is dropped unless the option `debug` is set.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Drop both steps."""
    replace_functions = interpreter._patch_lang

    def once_per_launch(function: Callable) -> Any:
        replaced = [not tl.core.is_builtin(module.load) for module in languages(function)]
        return interpreter._LangPatchScope() if replaced and all(replaced) else replace_functions(function)

    interpreter._patch_lang = once_per_launch
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@cache
def languages(function: Callable) -> list[ModuleType]:
    """Return the modules of the language that a function's own module imports."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]
