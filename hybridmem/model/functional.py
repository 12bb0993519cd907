"""Small differentiable functions with hand-written backwards.

On a CPU these functions are bound by memory traffic: autograd's composite backward of a norm takes ten times as long as
the norm. The implementations here make as few passes over the data as possible. torch.compile fuses passes by itself,
so compiled graphs use the same formulas in plain PyTorch.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRECISE = (torch.float32, torch.float64)


def linear_rows(
    linear: nn.Module, x: Float[Tensor, "*lead inputs"], start: int, stop: int | None = None
) -> Float[Tensor, "*lead rows"]:
    """Return the outputs `start` to `stop` of a linear layer."""
    # Adapters that replace the layer, and hooks that load its weight, take effect only when the layer is called.
    if type(linear) is nn.Linear and "forward" not in vars(linear):
        return F.linear(x, linear.weight[start:stop])
    return linear(x)[..., start:stop]


def rms_norm(x: Float[Tensor, "*lead dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*lead dim"]:
    """Compute x / sqrt(mean(x²) + eps) · weight over the last axis, in at least float32."""
    if x.is_cuda or torch.compiler.is_compiling():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    if not torch.is_grad_enabled():
        return _normalized(x, weight, 1 / x.shape[-1], eps)[0]
    return _Normalize.apply(x, weight, 1 / x.shape[-1], eps)


def l2_normalize(x: Float[Tensor, "*lead dim"], eps: float = 1e-6) -> Float[Tensor, "*lead dim"]:
    """Compute x / sqrt(sum(x²) + eps) over the last axis: unit vectors, and zero for zero."""
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    if not torch.is_grad_enabled():
        return _normalized(x, None, 1.0, eps)[0]
    return _Normalize.apply(x, None, 1.0, eps)


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast inside a function that chooses its own precision; autocast would round its sums."""

    @wraps(method)
    def precise(*arguments: Any) -> Any:
        x = arguments[0] if isinstance(arguments[0], Tensor) else arguments[1]  # after an autograd function's ctx
        if not torch.is_autocast_enabled(x.device.type):  # entering the context takes as long as a small norm
            return method(*arguments)
        with torch.autocast(x.device.type, enabled=False):
            return method(*arguments)

    return precise


@_without_autocast
def _normalized(x: Tensor, weight: Tensor | None, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return x · weight / sqrt(scale · sum(x²) + eps), and the factor of each row."""
    wide = x if x.dtype in PRECISE else x.float()
    # The norm reads the row once, where a product with itself would write its squares first.
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    if scale != 1:
        squares.mul_(scale)
    inverse = squares.add_(eps).rsqrt_()
    out = wide * inverse
    if weight is not None:
        out *= weight
    return (out if wide is x else out.to(x.dtype)), inverse


class _Normalize(torch.autograd.Function):
    """y = x · weight / sqrt(scale · sum(x²) + eps)."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, scale: float, eps: float) -> Tensor:
        out, inverse = _normalized(x, weight, scale, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.scale = scale
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        grad_weight = None
        if weight is not None:
            # Multiplying by the vector of inverse norms sums over all tokens in one pass.
            grad_weight = (inverse.flatten() @ (grad * wide).reshape(-1, x.shape[-1])).to(weight.dtype)
            grad = grad * weight
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3).mul_(-ctx.scale)
        return (grad * inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None, None


IN_CACHE = 2**16  # elements per block of a convolution, small enough to stay in the CPU cache


def causal_convolution(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "channels kernel"],
    same_document: Bool[Tensor, "batch time kernel"] | None = None,
) -> Float[Tensor, "batch time channels"]:
    """Convolve each channel over the current token and the `kernel - 1` tokens before it.

    Args:
        x: the tokens, preceded by `kernel - 1` earlier ones.
        weight: the taps; the last one applies to the current token.
        same_document: True for taps within the token's own document; None: all of them.
    """
    if torch.compiler.is_compiling():
        taps = weight.t().to(x.dtype)
        time = x.shape[1] - len(taps) + 1
        terms = (x[:, i : i + time] * tap for i, tap in enumerate(taps))
        if same_document is not None:
            terms = (term * same_document[..., i, None] for i, term in enumerate(terms))
        return torch.stack(list(terms)).sum(0)
    if x.shape[1] == weight.shape[1] and same_document is None and not torch.is_grad_enabled():
        return _convolved_token(x, weight)
    return _CausalConvolution.apply(x, weight, same_document)


@_without_autocast
def _convolved_token(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a single token, with the roundings of `_CausalConvolution`."""
    (first, *others), (tap, *taps) = x.unbind(1), weight.to(x.dtype).unbind(1)
    out = first * tap
    for token, tap in zip(others, taps, strict=True):
        out.addcmul_(token, tap)
    return out.unsqueeze(1)


class _CausalConvolution(torch.autograd.Function):
    """Convolution with one multiply-add over the sequence per tap; a grouped convolution takes three times as long."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, same_document: Tensor | None) -> Tensor:
        taps = weight.t().contiguous().to(x.dtype)
        out = x.new_empty(x.shape[0], x.shape[1] - len(taps) + 1, x.shape[2])
        for read, into, same in _parts(out.shape, same_document, x, out):
            for i, tap in enumerate(taps):
                tokens, factor = read.narrow(1, i, into.shape[1]), tap if same is None else same[..., i, None] * tap
                into.addcmul_(tokens, factor) if i else torch.mul(tokens, factor, out=into)
        ctx.save_for_backward(x, taps, same_document)
        ctx.weight_dtype = weight.dtype
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, same_document = ctx.saved_tensors
        grad_x, grad_taps = torch.zeros_like(x), torch.zeros_like(taps)
        for read, into, through, same in _parts(grad.shape, same_document, x, grad_x, grad):
            for i, tap in enumerate(taps):
                masked = through if same is None else through * same[..., i, None]
                into.narrow(1, i, through.shape[1]).addcmul_(masked, tap)
                grad_taps[i] += (masked * read.narrow(1, i, through.shape[1])).flatten(0, -2).sum(0)
        return grad_x, grad_taps.t().to(ctx.weight_dtype), None


def _parts(shape: torch.Size, mask: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Split tensors of `shape` into blocks of rows and of time on the CPU: a block stays in the cache for all taps.

    Blocks of a tensor with more time than `shape` overlap. The mask comes last, as None in blocks where it is all True.
    """
    batch, time, channels = shape
    on_cpu = tensors[0].device.type == "cpu"
    rows = max(1, IN_CACHE // max(1, time * channels) if on_cpu else batch)
    steps = max(1, IN_CACHE // max(1, channels) if on_cpu else time)
    for row in range(0, batch, rows):
        for start in range(0, time, steps):
            now = min(steps, time - start)
            blocks = [x[row : row + rows].narrow(1, start, x.shape[1] - time + now) for x in tensors]
            same = None if mask is None else mask[row : row + rows, start : start + now]
            yield *blocks, None if same is None or (on_cpu and bool(same.all())) else same


def block_pairs(
    x: Float[Tensor, "batch heads read dim"], front: Float[Tensor, "heads front dim"], size: int, past: int
) -> Float[Tensor, "folded heads columns dim"]:
    """Return [front, the block before, the own block] for every block of `size` queries; places without a key are 0.

    Args:
        x: the keys, or the values.
        front: those that precede every pair.
        size: tokens of a block.
        past: the number of keys before the first query, at most `size`.
    """
    blocks = -(-(x.shape[2] - past) // size)
    if torch.compiler.is_compiling():
        padded = F.pad(x, (0, 0, size - past, past + blocks * size - x.shape[2]))
        cut = padded.unflatten(2, (-1, size)).transpose(1, 2)
        return torch.cat((front.expand(len(x), blocks, -1, -1, -1), cut[:, :-1], cut[:, 1:]), dim=3).flatten(0, 1)
    return _BlockPairs.apply(x, front, size, past)


class _BlockPairs(torch.autograd.Function):
    """Pairs of blocks in one pass; padding, pairing and putting the front before them take one each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, front: Tensor, size: int, past: int) -> Tensor:
        batch, heads, read, dim = x.shape
        blocks, width = -(-(read - past) // size), front.shape[1]
        ctx.shapes, ctx.width, ctx.size, ctx.past = (x.shape, (batch, blocks)), width, size, past
        pairs = x.new_empty(batch, blocks, heads, width + 2 * size, dim)
        pairs[:, 0, :, : width + size - past] = 0
        pairs[:, -1, :, width + size :] = 0
        pairs[..., :width, :] = front
        for places, keys in _places(pairs, x, size, past):
            places.copy_(keys)
        return pairs.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, folded = ctx.shapes
        pairs, grad_x = grad.unflatten(0, folded), grad.new_zeros(shape)
        for places, keys in _places(pairs, grad_x, ctx.size, ctx.past):
            keys.add_(places)
        return grad_x, pairs[..., : ctx.width, :].sum((0, 1)), None, None


def _places(pairs: Tensor, x: Tensor, size: int, past: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the places in pairs of blocks, and of the keys that they hold."""
    whole = (x.shape[2] - past) // size
    end = past + whole * size
    before, own = pairs[..., -2 * size : -size, :], pairs[..., -size:, :]
    for places, keys in (
        (before[:, :1, :, size - past :], x[:, :, :past]),
        (before[:, 1:], x[:, :, past : past + (pairs.shape[1] - 1) * size]),
        (own[:, :whole], x[:, :, past:end]),
        (own[:, whole:, :, : x.shape[2] - end], x[:, :, end:]),
    ):
        yield places, keys.unflatten(2, (places.shape[1], places.shape[3])).transpose(1, 2)


def rotate(
    x: Float[Tensor, "batch heads time dim"],
    cos: Float[Tensor, "rows 1 time half"],
    sin: Float[Tensor, "rows 1 time half"],
) -> Float[Tensor, "batch heads time dim"]:
    """Rotate channels i and i + half by the i-th angle, and leave the rest unchanged (RoPE, arXiv 2104.09864)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _turn(x, cos, sin, 1)
    return _Rotate.apply(x, cos, sin)


def rotate_as_pretrained(
    x: Float[Tensor, "batch heads time dim"],
    cos: Float[Tensor, "rows 1 time turning"],
    sin: Float[Tensor, "rows 1 time turning"],
) -> Float[Tensor, "batch heads time dim"]:
    """Apply `rotate` with the rounding of transformers' models; each angle is given for both of its channels."""
    dim = cos.shape[-1]
    turning = x if dim == x.shape[-1] else x[..., :dim]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if turning is x else torch.cat((turned, x[..., dim:]), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward is the inverse rotation."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.shape[-1]
    # One product over whole rows, and two over half rows: short rows cost more per number.
    turned = x * F.pad(torch.cat((cos, cos), dim=-1), (0, x.shape[-1] - 2 * half), value=1.0)
    turned[..., :half].addcmul_(x[..., half : 2 * half], sin, value=-direction)
    turned[..., half : 2 * half].addcmul_(x[..., :half], sin, value=direction)
    return turned
