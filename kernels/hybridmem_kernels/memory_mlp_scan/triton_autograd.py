"""Deep memory in Triton, as an autograd function: kernel launches of forward and backward."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import Blocks
from .chunked import Inputs
from .reference import MemoryMLPState
from .triton_forward import read_kernel, scan_kernel
from .triton_plan import (
    GATE_POINTERS,
    READ_ROWS,
    Shape,
    builds,
    check_dtypes,
    check_sizes,
    constexprs,
    options,
    shape_of,
)
from .triton_read_backward import read_backward_kernel, surprise_kernel
from .triton_scan_backward import scan_backward_kernel
from .triton_tiles import VECTORS
from .triton_tokens import decays_backward_kernel, decays_kernel, gather_kernel, scatter_kernel

__all__ = ["builds", "memory_mlp_scan_triton"]

UNBOUNDED = 2.0**60  # a bound that no finite gradient reaches and that leaves theta bitwise unchanged


def _launch(kernel: Any, grid: tuple[int, ...], work: dict[str, Any], call: "Call") -> None:
    """Launch `kernel` with its arguments, taken from `work` by name."""
    backend = "cuda" if torch.version.hip is None else "hip"
    arguments = {name: work[name] for name in kernel.arg_names if name in work}
    arguments |= constexprs(kernel, call.shape, call.half, backend)
    kernel[grid](**arguments, **options(kernel, call.shape, call.half, backend))


class Call(NamedTuple):
    """Non-differentiable description of a call, shared by forward and backward."""

    half: bool
    shape: Shape
    widths: tuple[int, ...]
    blocks: Blocks
    max_grad_norm: float
    masked: bool  # some tokens may belong to no chunk

    @classmethod
    def of(cls, inputs: Inputs) -> "Call":
        """Split time into chunks and widths into tiles."""
        blocks, widths = inputs.blocks(), widths_of(inputs)
        half = all(x.dtype != torch.float32 for x in inputs[:3])
        shape = shape_of(widths, blocks.times.shape[-1])
        bound = UNBOUNDED if inputs.max_grad_norm is None else inputs.max_grad_norm
        return cls(half, shape, widths, blocks, bound, inputs.mask is not None)

    def pack(self, layers: Sequence[Tensor]) -> list[Float[Tensor, "... size"]]:
        """Pack groups of layers: pad each layer to whole tiles, and concatenate the layers of a group in float32."""
        depth = len(self.widths) - 1
        return [_pack(layers[i : i + depth], self.shape) for i in range(0, len(layers), depth)]

    def unpack(self, packed: Float[Tensor, "... size"]) -> tuple[Tensor, ...]:
        """Split a packed group into its layers, without padding."""
        layers = packed.split([rows * columns for rows, columns in self.shape.matrices], dim=-1)
        sizes = zip(layers, self.shape.matrices, pairwise(self.widths), strict=True)
        return tuple(w.unflatten(-1, size)[..., :rows, :columns] for w, size, (rows, columns) in sizes)


def widths_of(inputs: Inputs) -> tuple[int, ...]:
    """Return the widths before and after every layer."""
    learned = inputs.layers[: len(inputs.layers) // 4]
    return (inputs.q.shape[-1], *(w.shape[-1] for w in learned))


def memory_mlp_scan_triton(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    learned: Sequence[Float[Tensor, "heads _ _"]],
    state: MemoryMLPState,
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    chunk_size: int,
    max_grad_norm: float | None,
    even: bool = False,
) -> tuple[Float[Tensor, "batch heads time dim"], MemoryMLPState]:
    """Compute (out, state) as defined by the reference.

    `even` declares that every row is one document without padding and begins with a new chunk.

    Raises:
        ValueError: the inputs are float64, or the kernels do not support the chunk size or a width.
    """
    widths = (q.shape[-1], *(w.shape[-1] for w in learned))
    check_dtypes((q, k, v))
    check_sizes(widths, chunk_size)
    layers, depth = (*learned, *state.weights, *state.momenta, *state.anchors), len(learned)
    inputs = Inputs(
        q, k, v, alpha, eta, theta, state.filled, document_ids, mask, layers, chunk_size, max_grad_norm, even
    )
    if torch.compiler.is_compiling():
        out, filled, *after = torch.ops.hybridmem.memory_mlp_scan_triton(*inputs)
        weights, momenta, anchors = (tuple(after[i * depth : (i + 1) * depth]) for i in range(3))
        return out, MemoryMLPState(weights, momenta, anchors, filled)
    call = Call.of(inputs)
    if not call.blocks.times.numel():  # every token is padding
        return torch.zeros_like(v), state
    out, *packed = _Scan.apply(*inputs[:6], *call.pack(layers), call)
    weights, momenta, anchors = (call.unpack(group) for group in packed)
    return out, MemoryMLPState(weights, momenta, anchors, call.blocks.filled)


def _pack(layers: Sequence[Tensor], shape: Shape) -> Float[Tensor, "... size"]:
    """Pad layers to whole tiles and concatenate them in float32."""
    padded = [
        torch.nn.functional.pad(w.float(), (0, columns - w.shape[-1], 0, rows - w.shape[-2])).flatten(-2)
        for w, (rows, columns) in zip(layers, shape.matrices, strict=True)
    ]
    return torch.cat(padded, dim=-1)


class _Scan(torch.autograd.Function):
    """Autograd function of the scan on packed layers; it saves its inputs and the states before every chunk."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, call = arguments
        results, states = scan_forward(call, *tensors)
        ctx.save_for_backward(*tensors[:6], states)
        ctx.call = call
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        return *scan_backward(ctx.call, *tensors, states=states, grads=grads), None


def scan_forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    learned: Tensor,
    weights: Tensor,
    momenta: Tensor,
    anchors: Tensor,
) -> tuple[tuple[Tensor, ...], Float[Tensor, "lanes slots 2 size"]]:
    """Compute (out, weights, momenta, anchors), packed, and the states before every chunk for the backward."""
    shape, blocks = call.shape, call.blocks
    batch, heads = q.shape[:2]
    lanes, count = batch * heads, blocks.times.shape[1]
    states = _empty(q, lanes, count + 2, 2, shape.state_size)
    states[:, 0, 0], states[:, 0, 1], states[:, -1, 0] = (w.flatten(0, 1) for w in (weights, momenta, anchors))
    work = _work(call, (q, k, v), (alpha, eta, theta))
    work |= dict(states_ptr=states, fresh_ptr=learned.contiguous(), out_ptr=_token_output(v, call))
    with torch.cuda.device_of(q):
        _launch(gather_kernel, (lanes * count,), work, call)
        _launch(decays_kernel, (lanes * count,), work, call)
        _launch(scan_kernel, (lanes,), work, call)
        _launch(read_kernel, (lanes * count, shape.slots // READ_ROWS), work, call)
    rows = states.unflatten(0, (batch, heads))
    ends = (rows[:, :, -2, 0].clone(), rows[:, :, -2, 1].clone())
    end_anchors = rows[torch.arange(batch, device=q.device), :, _end_anchor(blocks), 0]
    return (work["out_ptr"], *ends, end_anchors), states


def scan_backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    *,
    states: Tensor,
    grads: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Compute the gradients of the inputs of `scan_forward` from those of (out, weights, momenta, anchors)."""
    grad_out, grad_weights, grad_momenta, grad_anchors = grads
    tokens, gates = (q, k, v), (alpha, eta, theta)
    batch, heads, count = *alpha.shape[:2], call.blocks.times.shape[1]
    lanes = batch * heads
    work = _work(call, tokens, gates, grad_out)
    chunks, slots, columns = work["z_ptr"].shape
    end_anchor = _end_anchor(call.blocks)
    work |= {f"{name}_ptr": _empty(alpha, chunks, slots, columns) for name in ("grad_a", "grad_error")}
    work |= {f"grad_{name}_ptr": _token_output(x, call) for name, x in zip("qkv", tokens, strict=True)}
    work |= zip(GATE_POINTERS[3:], (_token_output(gate, call) for gate in gates), strict=True)
    work |= dict(
        states_ptr=states,
        grad_vectors_ptr=_empty(alpha, chunks, VECTORS.value, slots),
        grad_decays_ptr=_empty(alpha, chunks, slots, slots),
        pairs_ptr=_empty(alpha, chunks, 2, slots, slots),
        grad_state_ptr=torch.stack((grad_weights, grad_momenta), dim=2),
        grad_anchor_ptr=torch.zeros_like(grad_weights, memory_format=torch.contiguous_format),
        grad_fresh_ptr=torch.zeros_like(grad_weights, memory_format=torch.contiguous_format),
        grad_end_anchor_ptr=grad_anchors.contiguous(),
        end_anchor_ptr=end_anchor,
    )
    with torch.cuda.device_of(alpha):
        _launch(gather_kernel, (chunks,), work, call)
        _launch(decays_kernel, (chunks,), work, call)
        _launch(surprise_kernel, (chunks,), work, call)
        _launch(read_backward_kernel, (chunks,), work, call)
        _launch(scan_backward_kernel, (lanes,), work, call)
        _launch(decays_backward_kernel, (chunks,), work, call)
        _launch(scatter_kernel, (chunks,), work, call)
    given = (end_anchor > count)[:, None, None]  # rows that began no chunk and kept the given anchors
    of_tokens = [work[f"grad_{name}_ptr"] for name in ("q", "k", "v", "alpha", "eta", "theta")]
    grad_start = work["grad_state_ptr"].unbind(2)
    grad_given = work["grad_anchor_ptr"] + grad_anchors.where(given, 0)
    return *of_tokens, work["grad_fresh_ptr"].sum(0), *grad_start, grad_given


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _token_output(like: Tensor, call: Call) -> Tensor:
    """Allocate an output per token, with zeros for masked tokens."""
    make = torch.zeros if call.masked else torch.empty
    return make(like.shape, dtype=like.dtype, device=like.device)


def _end_anchor(blocks: Blocks) -> Int[Tensor, " batch"]:
    """Return the index of the state at which each row's last chunk takes its gradients."""
    count = blocks.begins.shape[1]
    numbers = torch.arange(1, count + 1, device=blocks.begins.device)
    last = (blocks.begins * numbers).amax(1) - 1
    return last.where(last >= 0, count + 1)


def _work(
    call: Call, tokens: Sequence[Tensor], gates: Sequence[Tensor], grad_out: Tensor | None = None
) -> dict[str, Any]:
    """Collect the kernel arguments that forward and backward share, by name."""
    shape, blocks = call.shape, call.blocks
    batch, heads, time = gates[0].shape
    count = blocks.times.shape[1]
    chunks, columns = batch * heads * count, shape.row_size
    tables = dict(
        times_ptr=blocks.times, valid_ptr=blocks.valid, begins_ptr=blocks.begins, new_document_ptr=blocks.new_document
    )
    work: dict[str, Any] = {name: table.contiguous() for name, table in tables.items()}
    work |= zip(GATE_POINTERS[:3], (gate.contiguous() for gate in gates), strict=True)
    work |= dict(
        vectors_ptr=_empty(gates[0], chunks, VECTORS.value, shape.slots),
        decays_ptr=_empty(gates[0], chunks, 2, shape.slots, shape.slots),
        grad_y_ptr=None if grad_out is None else _empty(gates[0], chunks, shape.slots, columns),
    )
    work |= {f"{name}_ptr": _empty(gates[0], chunks, shape.slots, columns) for name in ("y", "z", "u")}
    for name, x in zip(("q", "k", "v", "grad_out"), (*tokens, grad_out), strict=True):
        work |= _strided(name, x)
    work |= shape._asdict()
    return work | dict(max_grad_norm=call.max_grad_norm, time=time, heads=heads, blocks=count, slots=shape.slots)


def _strided(name: str, x: Tensor | None) -> dict[str, Any]:
    """Return a token tensor and its strides as arguments of the gather kernel."""
    if x is not None and x.stride(-1) != 1:
        x = x.contiguous()
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_ptr": x} | dict(zip((f"{name}_batch", f"{name}_head", f"{name}_time"), strides, strict=True))
