"""Linear memory with surprise, momentum and forgetting, exact at any chunk size."""

from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import check_scan_inputs, check_state, may_overwrite
from ..dispatch import choose_backend
from . import library, triton_library  # noqa: F401  registers the operators of compiled graphs
from .chunked import memory_scan_chunked
from .reference import MemoryState, empty_state, memory_scan_reference, state_dtype
from .step import memory_step

__all__ = ["MemoryState", "memory_scan"]


def memory_scan(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    state: MemoryState | None = None,
    *,
    chunk_size: int = 64,
    document_ids: Int[Tensor, "batch time"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
    backend: str | None = None,
    in_place: bool = False,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Read and write a linear neural memory along a sequence (Titans, arXiv 2501.00663, eq. 9-14).

    Args:
        q, k: queries and keys, L2-normalised by the caller.
        v: values to store.
        alpha: forgetting gate in [0, 1], the share of the weights that a token erases.
        eta: momentum decay in [0, 1], the share of the momentum that a token keeps.
        theta: step size of a write, >= 0.
        state: state after earlier tokens; None starts at zero. It belongs to the first document of the row.
        chunk_size: tokens processed at once; it affects the speed, not the result.
        document_ids: document of each token; a token whose id differs from its predecessor's finds an empty memory.
        mask: False for tokens that read the memory without writing to it or decaying it, such as padding.
        backend: "torch", "triton" or "reference", the token-by-token definition; by default the choice of
            `use_backend` or HYBRIDMEM_BACKEND, else "triton" on a GPU and "torch" elsewhere.
        in_place: allow a single token without gradients to overwrite `state`.

    Returns:
        out in v's dtype, where token t reads the memory after its own write; and the state after the last token.
        States and sums are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is unknown or does not support them.
        ImportError: the Triton backend is requested but not installed.
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    check_scan_inputs(q, k, v, gates, chunk_size, {"document_ids": document_ids, "mask": mask})
    if state is None:
        state = empty_state(q, v)
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    for name, tensor in state._asdict().items():
        check_state(name, tensor, shape, q)
    state = MemoryState(*(tensor.to(state_dtype(q.dtype)) for tensor in state))
    backend = choose_backend("memory_scan", backend, q)
    if q.shape[2] == 0:
        return v, state
    if backend == "reference":
        return memory_scan_reference(q, k, v, alpha, eta, theta, state, document_ids, mask)
    if backend == "triton":
        from .triton_autograd import memory_scan_triton

        return memory_scan_triton(q, k, v, alpha, eta, theta, state, document_ids, mask, chunk_size)
    tensors = (q, k, v, alpha, eta, theta, *state)
    if q.shape[2] == 1 and mask is None and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        rounds = torch.is_autocast_enabled(q.device.type)  # entering the context takes as long as half a step
        with torch.autocast(q.device.type, enabled=False) if rounds else nullcontext():
            return memory_step(q, k, v, alpha, eta, theta, state, in_place and all(map(may_overwrite, state)))
    return memory_scan_chunked(q, k, v, alpha, eta, theta, state, document_ids, mask, chunk_size)
