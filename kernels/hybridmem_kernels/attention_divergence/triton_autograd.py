"""Attention policies in Triton, as an autograd function: kernel launches of forward and backward.

The forward takes one launch for the log-sum-exps of each policy and one for their comparison, the backward three for
every slab of queries. README.md has the derivation and the costs.
"""

from collections.abc import Sequence
from math import e, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..builds import DTYPES, Build
from .autograd import Settings, compare_policies
from .reference import AttentionPolicy, AttentionStats
from .triton_backward import grad_keys_kernel, grad_queries_kernel, slopes_kernel
from .triton_forward import compare_kernel, log_sums_kernel
from .triton_plan import OPERANDS, Plan, Tiles
from .triton_tiles import Strides, Vectors

LARGEST_DIM = 256
SLAB = 32  # elements of v per query and head that are stored at once; larger slabs accumulate dk in memory less often


def attention_divergence_triton(
    policy: AttentionPolicy,
    policy_ref: AttentionPolicy,
    query_mask: Bool[Tensor, "batch queries"] | None,
    key_mask: Bool[Tensor, "batch keys"] | None,
    exclude_self: bool,
    divergence: str,
) -> AttentionStats:
    """Compute the stats as defined by the reference, in float32.

    Raises:
        ValueError: a dtype other than float32, bfloat16 and float16, or heads of more than 256 dimensions.
    """
    for side in (policy, policy_ref):
        _check(side)
    functions = ("attention_divergence_triton", compare_forward, compare_backward)
    return compare_policies(*functions, policy, policy_ref, query_mask, key_mask, exclude_self, divergence)


def builds(
    dim: int,
    dim_ref: int,
    dtype: torch.dtype,
    *,
    exclude_self: bool = True,
    divergence: str = "jsd",
    masked: bool = True,
    hip: bool = False,
) -> list[Build]:
    """List the kernels of one forward and backward with both policies in `dtype`; `masked` means with both masks."""
    plan = Plan(dim, dim_ref, dtype, dtype, exclude_self, divergence, hip)
    kernels = [
        ("log_sums", log_sums_kernel, plan.log_sums),
        ("log_sums_ref", log_sums_kernel, plan.log_sums_ref),
        ("compare", compare_kernel, plan.compare),
        ("slopes", slopes_kernel, plan.compare),
        ("grad_queries", grad_queries_kernel, plan.gradient),
        ("grad_keys", grad_keys_kernel, plan.gradient),
    ]
    element = f"*{DTYPES[dtype]}"
    masks = dict(query_mask_ptr="*u8", key_mask_ptr="*u8", needed_blocks_ptr="*i32")
    vectors, strides = Vectors(element, element), Strides._make(["i32"] * len(Strides._fields))
    policies = dict(vectors=vectors, vectors_ref=vectors, strides=strides, strides_ref=strides)
    scales = dict.fromkeys(("scale", "log_scale", "log_scale_ref"), "fp32")
    others = masks | policies | scales | dict(grad_q_ptr=element)

    def build(name: str, kernel: Any, constants: dict[str, Any]) -> Build:
        absent = {} if masked else {mask: None for mask in masks if mask in kernel.arg_names}
        constexprs = constants | absent
        types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | others
        signature = {name: "constexpr" if name in constexprs else types[name] for name in kernel.arg_names}
        label = f"attention_divergence {name} {dim}/{dim_ref} {divergence} {element[1:]}"
        return Build(label, kernel, signature, constexprs, plan.tiles.num_warps, plan.tiles.num_stages)

    return [build(*kernel) for kernel in kernels]


def _check(policy: AttentionPolicy) -> None:
    """Raise a ValueError for dtypes or dimensions that have no kernel."""
    for x in (policy.q, policy.k):
        if x.dtype not in OPERANDS:
            raise ValueError(
                f"the triton backend takes float32, bfloat16 and float16 queries and keys, got {x.dtype}: choose "
                "backend='torch'"
            )
    if policy.q.shape[-1] > LARGEST_DIM:
        raise ValueError(
            f"the triton backend takes heads of at most {LARGEST_DIM} dimensions, got {policy.q.shape[-1]}: choose "
            "backend='torch'"
        )


class _Side(NamedTuple):
    """One policy in the form of kernel arguments."""

    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads columns dim"]
    scale: float
    window: int
    persistent: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scale: float, window: int | None, persistent: int) -> "_Side":
        """Make vectors contiguous, and replace a missing window by one that covers everything."""
        everything = k.shape[2] - persistent + 1
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        return cls(q, k, scale, everything if window is None else min(window, everything), persistent)

    @property
    def keys(self) -> int:
        """Return the number of keys without the persistent ones."""
        return self.k.shape[2] - self.persistent

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which scores are multiplied."""
        return torch.promote_types(self.q.dtype, self.k.dtype)

    def arguments(self, suffix: str = "") -> dict[str, Any]:
        """Return this policy's kernel arguments, whose names end in `suffix`."""
        arguments = dict(
            vectors=Vectors(self.q, self.k),
            strides=Strides(*self.q.stride()[:3], *self.k.stride()[:3]),
            log_scale=self.scale * log2(e),
            heads=self.q.shape[1],
            group=self.q.shape[1] // self.k.shape[1],
            persistent=self.persistent,
            window=self.window,
        )
        return {f"{name}{suffix}": x for name, x in arguments.items()}


class _Kept(NamedTuple):
    """Tensors that the forward saves for the backward in addition to its inputs."""

    normaliser: Float[Tensor, "batch heads queries"]  # L; inf for queries that are masked or have no support
    normaliser_ref: Float[Tensor, "batch heads_ref queries"]
    log_mass: Float[Tensor, "batch queries"]  # C
    log_mass_ref: Float[Tensor, "batch queries"]
    entropy: Float[Tensor, "batch queries"]
    mean_slope: Float[Tensor, "batch queries"]  # Σ p · (the divergence's derivative by p)

    def arguments(self) -> dict[str, Tensor]:
        """Return the tensors as kernel arguments."""
        return {f"{name}_ptr": x for name, x in self._asdict().items()}


def compare_forward(*tensors: Any, settings: Settings) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute (divergence, entropy, entropy_ref, mass), and the tensors for the backward."""
    with torch.cuda.device_of(tensors[0]):
        stats, kept = _compare(_Problem.of(tensors, settings))
    return tuple(stats), tuple(kept)


def compare_backward(
    *tensors: Any, kept: Sequence[Tensor], grads: Sequence[Tensor | None], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of (q, k) from the gradients of (divergence, entropy, entropy_ref, mass)."""
    with torch.cuda.device_of(tensors[0]):
        grad_q, grad_k = _gradient(_Problem.of(tensors, settings), _Kept(*kept), grads)
    return grad_q, grad_k.to(tensors[1].dtype)


class _Problem(NamedTuple):
    """Prepared inputs of a forward or backward."""

    side: _Side
    side_ref: _Side
    query_mask: Tensor | None
    key_mask: Tensor | None
    plan: Plan

    @classmethod
    def of(cls, tensors: Sequence[Any], settings: Settings) -> "_Problem":
        """Prepare the tensors q, k, q_ref, k_ref, query_mask, key_mask."""
        q, k, q_ref, k_ref, *masks = tensors
        side, side_ref = _Side.of(q, k, *settings[:3]), _Side.of(q_ref, k_ref, *settings[3:6])
        query_mask, key_mask = (None if x is None else x.contiguous().view(torch.uint8) for x in masks)
        plan = Plan(
            dim=side.q.shape[-1],
            dim_ref=side_ref.q.shape[-1],
            dtype=side.dtype,
            dtype_ref=side_ref.dtype,
            exclude_self=settings.exclude_self,
            divergence=settings.divergence,
            hip=torch.version.hip is not None,
            interpreted=triton.knobs.runtime.interpret,
        )
        return cls(side, side_ref, query_mask, key_mask, plan)

    def blocks(self) -> int:
        """Return the number of blocks of queries."""
        return triton.cdiv(self.side.q.shape[2], self.plan.tiles.rows)

    def of_both(self) -> dict[str, Any]:
        """Return the arguments and constants of kernels that compare both policies."""
        return dict(self.of_rows(), **self.side.arguments(), **self.side_ref.arguments("_ref"), **self.plan.compare)

    def of_rows(self) -> dict[str, Any]:
        """Return the arguments that all kernels share, and the launch options."""
        lengths = dict(queries=self.side.q.shape[2], keys=self.side.keys)
        return dict(lengths, key_mask_ptr=self.key_mask, **self.plan.options)


def _compare(problem: _Problem) -> tuple[AttentionStats, _Kept]:
    """Run both passes of the forward."""
    q, plan = problem.side.q, problem.plan
    batch, _, queries, _ = q.shape
    normaliser, log_share = _log_sums(problem, problem.side, plan.log_sums)
    normaliser_ref, log_share_ref = _log_sums(problem, problem.side_ref, plan.log_sums_ref)
    per_query = [q.new_empty(batch, queries, dtype=torch.float32) for _ in range(7)]
    stats, (log_mass, log_mass_ref, mean_slope) = AttentionStats(*per_query[:4]), per_query[4:]
    kept = _Kept(normaliser, normaliser_ref, log_mass, log_mass_ref, stats.entropy, mean_slope)
    compare_kernel[(problem.blocks(), batch)](
        log_share_ptr=log_share,
        log_share_ref_ptr=log_share_ref,
        divergence_ptr=stats.divergence,
        entropy_ref_ptr=stats.entropy_ref,
        mass_ptr=stats.mass,
        **kept.arguments(),
        **problem.of_both(),
    )
    return stats, kept


def _log_sums(
    problem: _Problem, side: _Side, constants: dict[str, Any]
) -> tuple[Float[Tensor, "batch heads queries"], Float[Tensor, "batch heads queries"]]:
    """Compute L, and the logarithm of each head's share on the support."""
    normaliser, log_share = (side.q.new_empty(side.q.shape[:3], dtype=torch.float32) for _ in range(2))
    log_sums_kernel[(problem.blocks(), side.q.shape[0] * side.q.shape[1])](
        query_mask_ptr=problem.query_mask,
        normaliser_ptr=normaliser,
        log_share_ptr=log_share,
        **problem.of_rows(),
        **side.arguments(),
        **constants,
    )
    return normaliser, log_share


class _Slab(NamedTuple):
    """Blocks of queries whose v is stored at once, and the tiles of keys that they see."""

    first_block: int
    blocks: int
    first_tile: int
    tiles: int


def _slabs(side: _Side, tiles: Tiles) -> tuple[int, list[_Slab]]:
    """Return the maximum number of key tiles that a block of queries sees, and the slabs."""
    _, heads, queries, _ = side.q.shape
    reach = (tiles.rows + side.window + tiles.columns - 3) // tiles.columns + 1
    slots = min(reach, triton.cdiv(side.keys, tiles.columns))
    total = triton.cdiv(queries, tiles.rows)
    blocks = min(total, max(1, SLAB * heads * queries // max(1, slots * tiles.rows * tiles.columns)))

    def slab(first: int) -> _Slab:
        stop = min(first + blocks, total)
        past = side.keys - queries
        first_tile = max(0, first * tiles.rows + past - side.window + 1) // tiles.columns
        last_time = min(stop * tiles.rows, queries) + past - 1
        return _Slab(first, stop - first, first_tile, last_time // tiles.columns + 1 - first_tile)

    return slots, [slab(first) for first in range(0, total, max(1, blocks))]


def _needed_blocks(query_mask: Tensor | None, rows: int) -> Int[Tensor, "batch 2"] | None:
    """Return for each row the first block with an unmasked query, and the index after the last such block."""
    if query_mask is None:
        return None
    padded = F.pad(query_mask, (0, -query_mask.shape[1] % rows))
    needed = padded.unflatten(1, (-1, rows)).amax(-1) > 0
    place = torch.arange(needed.shape[1], device=needed.device)
    first, stop = place.where(needed, needed.shape[1]).amin(1), (place + 1).where(needed, 0).amax(1)
    return torch.stack((first, stop), dim=1).int()


def _gradient(problem: _Problem, kept: _Kept, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Compute dq, and dk in float32, slab by slab."""
    side, plan = problem.side, problem.plan
    q, k, tiles = side.q, side.k, plan.tiles
    batch, heads = q.shape[:2]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    slots, slabs = _slabs(side, tiles)
    most = max((slab.blocks for slab in slabs), default=0)
    slopes = kept.normaliser.new_empty(batch, most, slots, tiles.rows, tiles.columns)
    pulled = torch.empty_like(kept.normaliser)
    of_stats = [torch.zeros_like(kept.entropy) if x is None else x.contiguous() for x in grads]
    persistent_tiles = triton.cdiv(side.persistent, tiles.columns)
    needed_blocks = _needed_blocks(problem.query_mask, tiles.rows)
    for slab in slabs:
        place = dict(slopes_ptr=slopes, first_block=slab.first_block, blocks=slab.blocks, slots=slots)
        slopes_kernel[(slab.blocks * slots, batch)](
            grad_divergence_ptr=of_stats[0],
            grad_entropy_ptr=of_stats[1],
            grad_mass_ptr=of_stats[3],
            **kept.arguments(),
            **place,
            **problem.of_both(),
        )
        of_head = dict(
            scale=side.scale,
            normaliser_ptr=kept.normaliser,
            log_mass_ptr=kept.log_mass,
            pulled_ptr=pulled,
            **place,
            **problem.of_rows(),
            **side.arguments(),
            **plan.gradient,
        )
        grad_queries_kernel[(slab.blocks, batch * heads)](grad_q_ptr=grad_q, **of_head)
        grad_keys_kernel[(persistent_tiles + slab.tiles, batch * k.shape[1])](
            grad_k_ptr=grad_k,
            needed_blocks_ptr=needed_blocks,
            first_tile=slab.first_tile,
            persistent_tiles=persistent_tiles,
            **of_head,
        )
    return grad_q, grad_k
