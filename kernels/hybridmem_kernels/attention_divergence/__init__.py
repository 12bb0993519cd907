"""Attention as a policy: its divergence from another policy, its entropy, and its mass on earlier tokens."""

from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dispatch import choose_backend
from . import library  # noqa: F401  registers the operators of compiled graphs
from .chunked import attention_divergence_chunked
from .reference import DIVERGENCES, FLOOR, AttentionPolicy, AttentionStats, attention_divergence_reference

__all__ = ["DIVERGENCES", "FLOOR", "AttentionStats", "attention_divergence"]

Setting = TypeVar("Setting", float | None, int | None)


def attention_divergence(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    q_ref: Float[Tensor, "batch heads_ref queries dim_ref"],
    k_ref: Float[Tensor, "batch kv_heads_ref columns_ref dim_ref"],
    *,
    scale: float | None = None,
    scale_ref: float | Literal["same"] | None = "same",
    window: int | None = None,
    window_ref: int | Literal["same"] | None = "same",
    num_persistent: int = 0,
    num_persistent_ref: int = 0,
    query_mask: Bool[Tensor, "batch queries"] | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    exclude_self: bool = True,
    divergence: str = "jsd",
    backend: str | None = None,
) -> AttentionStats:
    """Compare two attention policies at every query, without a queries × keys map (RAL, arXiv 2602.04884).

    A policy is p_t(i), the mean over heads of the attention of query t to key i, restricted to the keys before t and
    renormalised. p is the policy of (q, k), and p_ref the policy of (q_ref, k_ref), which may come from the rollout or
    from a teacher with other heads.

    Args:
        q: queries after rotation: the last `queries` positions of the row, as with a cache.
        k: keys after rotation, `num_persistent` + `keys` columns; kv heads are shared by groups of heads.
        q_ref, k_ref: queries and keys of the reference. They are detached and receive no gradient.
        scale: factor of the scores; None: dim**-0.5.
        scale_ref: factor of the reference's scores; "same": `scale`, None: dim_ref**-0.5. If `scale` is None, both
            mean dim_ref**-0.5.
        window: query t sees keys t - window < j <= t; None: all j <= t.
        window_ref: window of the reference; "same": `window`, None: no window, all j <= t.
        num_persistent, num_persistent_ref: leading columns of k that every query sees regardless of the window. They
            take part in the softmax but not in the distribution.
        query_mask: False for queries to ignore; only positions that some row needs are computed.
        key_mask: False for padding, which no query attends to. To exclude queries at padding, use `query_mask`.
        exclude_self: exclude t itself from its distribution, as RAL does.
        divergence: "jsd" = ½ KL(p ‖ m) + ½ KL(p_ref ‖ m) with m = ½ (p + p_ref), in [0, ln 2]; "kl" = KL(p_ref ‖ p),
            which makes p cover p_ref; "reverse_kl" = KL(p ‖ p_ref). The KLs divide by at least 1e-8, so they are finite
            where the other policy vanishes; a p below that floor receives no gradient.
        backend: "torch" or "triton" for a tiled computation, or "reference", the definition with full maps; by default
            the choice of `use_backend` or HYBRIDMEM_BACKEND, else "triton" on a GPU and "torch" elsewhere.

    Returns:
        divergence, entropy of p, entropy of p_ref (nats), and mass, the share of p's attention on the support before
        renormalisation; each (batch, queries), float32 (float64 for float64 queries). All are 0 if `query_mask` is
        False or the support is empty; the divergence is also 0 if the reference's support is empty. Gradients reach q
        and k through divergence, entropy and mass.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a setting is out of range, or the divergence or backend is
            unknown or does not support the inputs.
        ImportError: the Triton backend is requested but not installed.
    """
    of_ref = (_of_reference("scale_ref", scale, scale_ref), _of_reference("window_ref", window, window_ref))
    policy = _policy("", q, k, scale, window, num_persistent)
    policy_ref = _policy("_ref", q_ref.detach(), k_ref.detach(), *of_ref, num_persistent_ref)
    _check_together(policy, policy_ref, query_mask, key_mask)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    arguments = (policy, policy_ref, query_mask, key_mask, exclude_self, divergence)
    backend = choose_backend("attention_divergence", backend, q)
    if backend == "reference":
        return attention_divergence_reference(*arguments)
    if backend == "triton":
        from .triton_autograd import attention_divergence_triton

        return attention_divergence_triton(*arguments)
    return attention_divergence_chunked(*arguments)


def _of_reference(name: str, own: Setting, given: Setting | str) -> Setting:
    """Return a setting of the reference: the given value, or the policy's value for "same"."""
    if not isinstance(given, str):
        return given
    if given != "same":
        raise ValueError(f'{name}={given!r} is unknown; give a number, None or "same"')
    return own


def _policy(
    suffix: str, q: Tensor, k: Tensor, scale: float | None, window: int | None, num_persistent: int
) -> AttentionPolicy:
    """Check the arguments of one policy, whose names end in `suffix`."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q{suffix}, k{suffix} must be (batch, heads, time, dim), got q{suffix} {tuple(q.shape)}, "
            f"k{suffix} {tuple(k.shape)}"
        )
    if not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(f"q{suffix}, k{suffix} must be floating point, got {q.dtype} and {k.dtype}")
    if len(k) != len(q) or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k{suffix} must have the batch and dim of q{suffix} {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the heads of q{suffix} must be a multiple of k{suffix}'s heads, got {q.shape[1]} and {k.shape[1]}"
        )
    if num_persistent < 0:
        raise ValueError(f"num_persistent{suffix} must be at least 0, got {num_persistent}")
    if window is not None and window < 1:
        raise ValueError(f"window{suffix} must be at least 1, or None for no window, got {window}")
    if q.shape[2] + num_persistent > k.shape[2]:
        raise ValueError(
            f"k{suffix} must hold num_persistent{suffix}={num_persistent} columns and a key for each of the "
            f"{q.shape[2]} queries, got {k.shape[2]} columns"
        )
    return AttentionPolicy(q, k, q.shape[-1] ** -0.5 if scale is None else scale, window, num_persistent)


def _check_together(
    policy: AttentionPolicy, policy_ref: AttentionPolicy, query_mask: Tensor | None, key_mask: Tensor | None
) -> None:
    """Raise a ValueError if policies and masks belong to different rows."""
    q, q_ref = policy.q, policy_ref.q
    if (len(q_ref), q_ref.shape[2]) != (len(q), q.shape[2]):
        raise ValueError(f"q_ref must have the batch and queries of q {tuple(q.shape)}, got {tuple(q_ref.shape)}")
    keys, keys_ref = (side.k.shape[2] - side.num_persistent for side in (policy, policy_ref))
    if keys != keys_ref:
        raise ValueError(
            f"k and k_ref must hold equally many keys after their persistent ones, got {keys} and {keys_ref}: "
            "check num_persistent and num_persistent_ref"
        )
    masks = {"query_mask": (query_mask, q.shape[2]), "key_mask": (key_mask, keys)}
    for name, (mask, length) in masks.items():
        if mask is not None and tuple(mask.shape) != (len(q), length):
            raise ValueError(f"{name} must be (batch, {length}) = {(len(q), length)}, got {tuple(mask.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} must be boolean (True: valid), got {mask.dtype}")
    tensors = {"k": policy.k, "q_ref": q_ref, "k_ref": policy_ref.k, "query_mask": query_mask, "key_mask": key_mask}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}")
