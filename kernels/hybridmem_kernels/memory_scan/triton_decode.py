"""Decoding: one token of the linear memory in a single launch."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from ..builds import DTYPES, Build
from .reference import MemoryState


@triton.jit(do_not_specialize=["heads"])
@no_type_check
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    alpha_ptr,
    eta_ptr,
    theta_ptr,
    mask_ptr,
    weight_ptr,
    momentum_ptr,
    out_ptr,
    next_weight_ptr,
    next_momentum_ptr,
    heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    alpha_batch,
    alpha_head,
    eta_batch,
    eta_head,
    theta_batch,
    theta_head,
    mask_batch,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute equations 1 to 3 of README.md for one (batch, head) and a block of value columns."""
    lane = tl.program_id(0).to(tl.int64)
    row, head = lane // heads, lane % heads
    dims = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(1) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    inside = (dims < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    places = lane * KEY_DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + values[None, :]
    weight = tl.load(weight_ptr + places, mask=inside, other=0.0)
    momentum = tl.load(momentum_ptr + places, mask=inside, other=0.0)
    q = tl.load(q_ptr + row * q_batch + head * q_head + dims, mask=dims < KEY_DIM, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * k_batch + head * k_head + dims, mask=dims < KEY_DIM, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_batch + head * v_head + values, mask=values < VALUE_DIM, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr + row * alpha_batch + head * alpha_head).to(tl.float32)
    eta = tl.load(eta_ptr + row * eta_batch + head * eta_head).to(tl.float32)
    theta = tl.load(theta_ptr + row * theta_batch + head * theta_head).to(tl.float32)

    # (1), (2)
    error = tl.sum(k[:, None] * weight, axis=0) - v
    written = eta * momentum - theta * (k[:, None] * error[None, :])
    kept = (1 - alpha) * weight + written
    if MASKED:
        counts = tl.load(mask_ptr + row * mask_batch).to(tl.int1)
        kept, written = tl.where(counts, kept, weight), tl.where(counts, written, momentum)
    tl.store(next_weight_ptr + places, kept, mask=inside)
    tl.store(next_momentum_ptr + places, written, mask=inside)
    # (3)
    out = tl.sum(q[:, None] * kept, axis=0)
    tl.store(out_ptr + lane * VALUE_DIM + values, out.to(out_ptr.dtype.element_ty), mask=values < VALUE_DIM)


def memory_step_triton(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    state: MemoryState,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Compute (out, state) of one token, without gradients; the given state is not modified.

    The first token of a call continues the state's document, so a single token needs no document ids.

    Raises:
        ValueError: the inputs have more than one token.
    """
    if q.shape[2] != 1:
        raise ValueError(f"memory_step_triton takes one token, got {q.shape[2]}: use memory_scan for more")
    with torch.no_grad(), torch.cuda.device_of(q):
        inputs = (*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)), alpha, eta, theta)
        given = MemoryState(*(x.contiguous() for x in state))
        following = MemoryState(*(torch.empty_like(x) for x in given))
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        arguments = _arguments(inputs, mask, given, following, out)
        constexprs, num_warps = _compiled_as(q.shape[-1], v.shape[-1], mask is not None)
        grid = (q.shape[0] * q.shape[1], triton.cdiv(v.shape[-1], constexprs["VALUE_BLOCK"]))
        step_kernel[grid](**arguments, **constexprs, num_warps=num_warps, num_stages=1)
    return out, following


def _arguments(
    inputs: tuple[Tensor, ...], mask: Tensor | None, given: MemoryState, following: MemoryState, out: Tensor
) -> dict[str, Tensor | int]:
    names = ("q", "k", "v", "alpha", "eta", "theta")
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in zip(names, inputs, strict=True)}
    arguments["mask_ptr"] = out if mask is None else mask  # a placeholder, not read without a mask
    arguments.update(weight_ptr=given.weight, momentum_ptr=given.momentum, out_ptr=out)
    arguments.update(next_weight_ptr=following.weight, next_momentum_ptr=following.momentum, heads=out.shape[1])
    for name, x in zip(names, inputs, strict=True):
        arguments[f"{name}_batch"], arguments[f"{name}_head"] = x.stride(0), x.stride(1)
    arguments["mask_batch"] = 0 if mask is None else mask.stride(0)
    return arguments


def _compiled_as(key_dim: int, value_dim: int, masked: bool) -> tuple[dict[str, Any], int]:
    """Return (constexprs, num_warps); a lane's state is read and written once, in column blocks that fit registers."""
    block = triton.next_power_of_2(key_dim)
    constexprs = dict(KEY_DIM=key_dim, VALUE_DIM=value_dim, KEY_BLOCK=block, VALUE_BLOCK=32, MASKED=masked)
    return constexprs, 4 if block <= 128 else 8


def step_builds(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[Build]:
    """List the builds of the kernel with and without a mask, for float32 gates."""
    builds = []
    for masked in (False, True):
        constexprs, num_warps = _compiled_as(key_dim, value_dim, masked)
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{DTYPES[dtype]}")
        types["mask_ptr"] = "*i1" if masked else types["q_ptr"]
        signature = {}
        for name in step_kernel.arg_names:
            other = "constexpr" if name in constexprs else "*fp32" if name.endswith("_ptr") else "i32"
            signature[name] = types.get(name, other)
        name = f"step_kernel {key_dim}x{value_dim} {DTYPES[dtype]}{' masked' if masked else ''}"
        builds.append(Build(name, step_kernel, signature, constexprs, num_warps, 1, has_dots=False))
    return builds
