"""Deep memory: an MLP trained while reading, without storing weights per token."""

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import check_scan_inputs, check_state
from ..dispatch import choose_backend
from ..memory_scan.reference import state_dtype
from . import library, triton_library  # noqa: F401  registers the operators of compiled graphs
from .chunked import memory_mlp_scan_chunked
from .reference import MemoryMLPState, initial_state, memory_mlp, memory_mlp_scan_reference

__all__ = ["MemoryMLPState", "memory_mlp", "memory_mlp_scan"]


def memory_mlp_scan(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    weights: Sequence[Float[Tensor, "heads _ _"]],
    state: MemoryMLPState | None = None,
    *,
    chunk_size: int = 64,
    max_grad_norm: float | None = None,
    document_ids: Int[Tensor, "batch time"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch heads time dim"], MemoryMLPState]:
    """Read and write a deep neural memory along a sequence (Titans, arXiv 2501.00663, eq. 9-14 and section 3.2).

    Args:
        q, k: queries and keys, L2-normalised by the caller.
        v: values to store, with the keys' dimension, because the MLP has a residual connection.
        alpha, eta, theta: forgetting, momentum decay and step size, as in `memory_scan`.
        weights: learned initial weights of each layer, first to last; every document starts from them.
        state: state after earlier tokens; it belongs to the first document of the row.
        chunk_size: tokens that take their gradients at the same weights. Here it is part of the model and affects
            results: chunks are counted from a document's first token, independently of how it is fed in.
        max_grad_norm: bound on the norm of a token's gradient, over all layers of a head.
        document_ids, mask, backend: as in `memory_scan`.

    Returns:
        out in v's dtype, and the state after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is unknown or does not support them.
        ImportError: the Triton backend is requested but not installed.
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    check_scan_inputs(q, k, v, gates, chunk_size, {"document_ids": document_ids, "mask": mask})
    _check_weights(weights, q, v)
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise ValueError(f"max_grad_norm must be above 0 or None, got {max_grad_norm}")
    dtype = state_dtype(q.dtype)
    even = state is None and document_ids is None and mask is None
    if state is None:
        state = initial_state(weights, q.shape[0], dtype)
    for name in ("weights", "momenta", "anchors"):
        layers = getattr(state, name)
        if len(layers) != len(weights):
            raise ValueError(f"state.{name} has {len(layers)} layers, but weights has {len(weights)}: make them equal")
        for layer, weight in zip(layers, weights, strict=True):
            check_state(name, layer, (q.shape[0], *weight.shape), q)
    start, momenta, anchors = (tuple(w.to(dtype) for w in layers) for layers in state[:3])
    state = MemoryMLPState(start, momenta, anchors, state.filled)
    backend = choose_backend("memory_mlp_scan", backend, q)
    if q.shape[2] == 0:
        return v, state
    arguments = (q, k, v, alpha, eta, theta, weights, state, document_ids, mask, chunk_size, max_grad_norm)
    if backend == "reference":
        return memory_mlp_scan_reference(*arguments)
    if backend == "triton":
        from .triton_autograd import memory_mlp_scan_triton

        return memory_mlp_scan_triton(*arguments, even)
    return memory_mlp_scan_chunked(*arguments, even)


def _check_weights(weights: Sequence[Tensor], q: Tensor, v: Tensor) -> None:
    if len(weights) < 2:
        raise ValueError(f"weights has {len(weights)} layers, but at least 2 are needed: use memory_scan for depth 1")
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v must have the keys' dimension {q.shape[-1]} for the residual, got {v.shape[-1]}")
    heads, dim = q.shape[1], q.shape[-1]
    widths = [dim, *(w.shape[-1] for w in weights)]
    for n, weight in enumerate(weights):
        if tuple(weight.shape) != (heads, widths[n], widths[n + 1]):
            raise ValueError(
                f"weights[{n}] must be (heads, in, out) = ({heads}, {widths[n]}, …), got {tuple(weight.shape)}"
            )
    if widths[-1] != dim:
        raise ValueError(f"weights[-1] must have an output dimension of {dim}, got {widths[-1]}")
