"""Input checks shared by the operators."""

import torch
from torch import Tensor


def check_scan_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    chunk_size: int,
    per_token: dict[str, Tensor | None],
) -> None:
    """Raise a ValueError that names the argument if shapes, dtypes or devices do not match."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be (batch, heads, time, dim), got q {tuple(q.shape)}, v {tuple(v.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be (batch, heads, time, value_dim) like q {tuple(q.shape)}, got {tuple(v.shape)}")
    for name, gate in gates.items():
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be (batch, heads, time) = {tuple(q.shape[:3])}, got {tuple(gate.shape)}")
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != (q.shape[0], q.shape[2]):
            raise ValueError(f"{name} must be (batch, time) = {(q.shape[0], q.shape[2])}, got {tuple(tensor.shape)}")
    if (mask := per_token.get("mask")) is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True: the token is valid), got {mask.dtype}")
    if not q.is_floating_point():
        raise ValueError(f"q, k, v must be floating point, got {q.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def check_state(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise a ValueError if a given state does not fit the memory."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"state.{name} must be {shape} here, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"state.{name} is on {tensor.device} but q is on {like.device}")


def may_overwrite(state: Tensor) -> bool:
    """Return whether a step may write over a state: it is dense, in no graph, and of the current inference mode."""
    leaves_inference = state.is_inference() and not torch.is_inference_mode_enabled()
    return state.is_contiguous() and not state.requires_grad and not leaves_inference
