"""CPU speed of the memory against titans-pytorch (extra `bench`), its own matrix products, and attention.

    python scripts/bench_memory.py [--sections layer products model decode divergence] [--allocator glibc]

Alternatives are timed in turn in one process, and a ratio is the median over rounds. Memory is the peak resident set of
three steps minus the resident set before, measured in a separate process per alternative. All use the same allocator:
"kept" has the settings of training (hybridmem/training/allocator.py), and "glibc" those of the C library. Use
--threads 1 on a shared machine, to measure CPU time.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_measure import in_turn, peak_megabytes, ratio, resident_megabytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.compare.environment import processor
from hybridmem.model.attention import ShortRangeAttention
from hybridmem.model.memory import NeuralMemory
from hybridmem.model.sequence import TokenSequence, rotary_angles
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.denormals import flush_denormals
from hybridmem_kernels import attention_divergence, memory_mlp_scan, memory_scan

BATCH, WIDTH, HEADS, DIM, CHUNK, LENGTHS = 4, 256, 4, 64, 64, (1024, 4096)
CASES = ((1, 1), (2, 1), (2, 4))  # memory depth and expansion; titans-pytorch's default is 4, hybridmem's is 1
ROW_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
ALLOCATORS = ("kept", "glibc")
PRECISIONS = ("float32", "bfloat16")
DENORMALS = ("flushed", "kept")
Row = dict[str, Any]

_precision = "float32"


def import_titans() -> Any:
    """Import titans-pytorch, which only some sections need."""
    return import_module("titans_pytorch")


def our_layer(depth: int, expansion: int) -> NeuralMemory:
    """Return a `NeuralMemory` with a model's initialisation."""
    config = HybridMemConfig(
        variant="lmm",
        num_hidden_layers=1,
        hidden_size=WIDTH,
        memory_heads=HEADS,
        memory_head_dim=DIM,
        memory_chunk_size=CHUNK,
        memory_depth=depth,
        memory_expansion=expansion,
    )
    (memory,) = (part for part in HybridMemForCausalLM(config).modules() if isinstance(part, NeuralMemory))
    return memory


def their_layer(depth: int, expansion: int) -> nn.Module:
    """Return titans-pytorch's `NeuralMemory` with its defaults."""
    titans = import_titans()
    model = titans.MemoryMLP(DIM, depth=depth, expansion_factor=expansion)
    return titans.NeuralMemory(dim=WIDTH, dim_head=DIM, heads=HEADS, chunk_size=CHUNK, model=model)


def computing() -> torch.autocast:
    """Return the context of forward passes in the precision that `start` set."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_precision == "bfloat16")


def layer_step(side: str, depth: int, expansion: int, length: int, batch: int = BATCH) -> Callable[[], None]:
    """Return the forward and backward pass of one layer, including projections and the input's gradient."""
    layer: nn.Module = our_layer(depth, expansion) if side == "ours" else their_layer(depth, expansion)
    x, grad = torch.randn(batch, length, WIDTH, requires_grad=True), torch.randn(batch, length, WIDTH)
    more = (None, TokenSequence()) if side == "ours" else ()

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with computing():
            out = layer(x, *more)[0]
        out.backward(grad.to(out.dtype))

    return step


def layer_speed(depth: int, expansion: int, length: int, rounds: int) -> Row:
    """Measure tokens per second of both layers."""
    steps = {side: layer_step(side, depth, expansion, length) for side in ("ours", "theirs")}
    seconds = in_turn(steps, rounds)
    speeds = {side: round(BATCH * length / statistics.median(of)) for side, of in seconds.items()}
    return {**speeds, "times_theirs": round(ratio(seconds, "theirs", "ours"), 2)}


def layer_memory(side: str, depth: int, expansion: int, length: int) -> float:
    """Measure the peak megabytes of three steps, beyond the memory resident after a short one."""
    layer_step(side, depth, expansion, 2 * CHUNK)()
    step, before = layer_step(side, depth, expansion, length), resident_megabytes()
    for _ in range(3):
        step()
    return round(peak_megabytes() - before, 1)


def bench_layer(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Compare the speed and peak memory of both memory layers."""
    rows = []
    for depth, expansion in CASES:
        for length in LENGTHS:
            case = (depth, expansion, length)
            row = run(layer_speed, *case, rounds)
            ours, theirs = (run(layer_memory, side, *case) for side in ("ours", "theirs"))
            row |= {"our_mb": ours, "their_mb": theirs, "share_of_their_mb": round(ours / theirs, 2)}
            rows.append({"depth": depth, "expansion": expansion, "time": length, **row})
            say("layer", rows[-1])
    return rows


def length_speed(depth: int, rounds: int) -> Row:
    """Measure microseconds per token of our layer, forward and backward, by the length of a row."""
    steps = {str(length): layer_step("ours", depth, 1, length, batch=1) for length in ROW_LENGTHS}
    seconds = in_turn(steps, rounds)
    per_token = {length: round(min(of) / int(length) * 1e6, 2) for length, of in seconds.items()}
    spread = max(per_token.values()) / min(per_token.values()) - 1
    return {"depth": depth, "us_per_token": per_token, "spread": round(spread, 3)}


def bench_lengths(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Compare the cost per token of rows of different lengths."""
    rows = []
    for depth in (1, 2, 4):
        rows.append(run(length_speed, depth, rounds))
        say("lengths", rows[-1])
    return rows


class Products(TorchDispatchMode):
    """Dispatch mode that records the shapes and strides of all batched matrix products."""

    SMALLEST = 8  # ignores products with a side below this, which are sums and 2 x 2 matrices

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[tuple[Any, Any], tuple[Any, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("bmm", "baddbmm", "baddbmm_"):
            pair = args[-2:]
            if min(*pair[0].shape[1:], pair[1].shape[2]) >= self.SMALLEST:
                self.operands.append(tuple((x.shape, x.stride()) for x in pair))  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))

    def replay(self) -> Callable[[], None]:
        """Return a function that repeats the recorded products alone, each on its own operands."""
        pairs = [[torch.empty_strided(*operand).normal_() for operand in pair] for pair in self.operands]
        outs = [a.new_empty(len(a), a.shape[1], b.shape[2]) for a, b in pairs]

        def multiply() -> None:
            for (a, b), out in zip(pairs, outs, strict=True):
                torch.bmm(a, b, out=out)

        return multiply


def scan_step(depth: int, batch: int, length: int) -> Callable[[], object]:
    """Return the forward and backward pass of `memory_scan`, or from depth 2 on of `memory_mlp_scan`."""
    q, k, v = (torch.randn(batch, HEADS, length, DIM) for _ in range(3))
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    gates = [torch.rand(batch, HEADS, length) * top for top in (0.05, 0.8, 0.2)]
    weights = [torch.randn(HEADS, DIM, DIM) / 16 for _ in range(depth)] if depth > 1 else []
    tokens: dict[str, Any] = dict(zip(("q", "k", "v", "alpha", "eta", "theta"), (q, k, v, *gates), strict=True))
    inputs, grad = [x.requires_grad_() for x in (*tokens.values(), *weights)], torch.randn_like(v)

    def step() -> object:
        if depth == 1:
            out, _ = memory_scan(**tokens, chunk_size=CHUNK)
        else:
            out, _ = memory_mlp_scan(**tokens, weights=weights, chunk_size=CHUNK, max_grad_norm=1.0)
        return torch.autograd.grad(out, inputs, grad)

    return step


def products_of(step: Callable[[], object]) -> Callable[[], None]:
    """Return the matrix products of a step, alone."""
    with Products() as products:
        step()
    return products.replay()


def products_share(depth: int, length: int, rounds: int) -> Row:
    """Measure the time of a scan's matrix products alone, as a share of the scan's time."""
    step = scan_step(depth, BATCH, length)
    seconds = in_turn({"scan": step, "products": products_of(step)}, rounds)
    figures = {f"{name}_ms": round(statistics.median(of) * 1e3, 2) for name, of in seconds.items()}
    return {**figures, "share": round(ratio(seconds, "products", "scan"), 3)}


def bench_products(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Measure the products' share of memory_scan and memory_mlp_scan."""
    rows = []
    for depth in (1, 2):
        for length in LENGTHS:
            rows.append({"depth": depth, "time": length, **run(products_share, depth, length, rounds)})
            say("products", rows[-1])
    return rows


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def our_model(variant: str, wanted: int | None = None, depth: int = 1) -> HybridMemForCausalLM:
    """Return a model of four layers, with feed-forward layers wide enough for `wanted` parameters."""
    config = dict(variant=variant, num_hidden_layers=4, hidden_size=WIDTH, memory_depth=depth, memory_chunk_size=CHUNK)
    model = HybridMemForCausalLM(HybridMemConfig(**config))
    if wanted is None:
        return model
    wider = model.config.intermediate_size + round((wanted - parameters(model)) / (4 * 3 * WIDTH))
    return HybridMemForCausalLM(HybridMemConfig(**config, intermediate_size=wider))


def their_model(streams: int | None) -> nn.Module:
    """Return titans-pytorch's model of the same width and depth, with segments as long as hybridmem's window."""
    more = {} if streams is None else {"num_residual_streams": streams}
    return import_titans().MemoryAsContextTransformer(
        num_tokens=259,
        dim=WIDTH,
        depth=4,
        segment_len=256,
        neural_memory_segment_len=CHUNK,
        heads=HEADS,
        dim_head=DIM,
        num_persist_mem_tokens=4,
        neural_memory_kwargs=dict(dim_head=DIM, heads=HEADS),
        **more,
    )


def model_speed(length: int, rounds: int) -> Row:
    """Measure tokens per second, forward and backward, of whole models with equally many parameters."""
    theirs = {"mac": their_model(None), "mac, one residual stream": their_model(1)}
    size = parameters(theirs["mac"])
    ours = {
        "mag": our_model("mag", size),
        "mag, depth 2": our_model("mag", size, depth=2),
        "swa": our_model("swa", size),
    }
    models: dict[str, nn.Module] = {**ours, **theirs}
    ids = torch.randint(0, 256, (BATCH, length))

    def step(model: nn.Module, options: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with computing():
                out = model(ids, **options)
            (out if isinstance(out, Tensor) else out.loss).backward()

        return run

    steps = {name: step(model, dict(labels=ids, use_cache=False)) for name, model in ours.items()}
    steps |= {name: step(model, dict(return_loss=True)) for name, model in theirs.items()}
    seconds = in_turn(steps, rounds)
    return {
        "time": length,
        "parameters": {name: parameters(model) for name, model in models.items()},
        "tokens_per_second": {name: round(BATCH * length / statistics.median(of)) for name, of in seconds.items()},
        "mag_times_mac": round(ratio(seconds, "mac", "mag"), 2),
        "mag_times_mac_one_stream": round(ratio(seconds, "mac, one residual stream", "mag"), 2),
        "mag_depth_2_times_mac": round(ratio(seconds, "mac", "mag, depth 2"), 2),
        "mag_depth_2_times_mac_one_stream": round(ratio(seconds, "mac, one residual stream", "mag, depth 2"), 2),
        "mag_time_of_swa": round(ratio(seconds, "mag", "swa"), 2),
    }


def bench_model(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Compare whole models."""
    rows = [run(model_speed, 1024, rounds)]
    say("model", rows[0])
    return rows


@torch.no_grad()
def decode_speed(tokens: int, rounds: int) -> Row:
    """Measure milliseconds per decoded token after 1,000 tokens and after `tokens`, read in pieces of 4,000."""
    model = our_model("mag").eval()
    caches: dict[str, DynamicCache] = {}
    for read in (1_000, tokens):
        caches[f"{read:,}"] = cache = DynamicCache(config=model.config)
        for start in range(0, read, 4_000):
            piece = torch.randint(0, 256, (1, min(4_000, read - start)))
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.randint(0, 256, (1, 1))
    steps = {name: partial(model, token, past_key_values=cache) for name, cache in caches.items()}
    seconds = in_turn(steps, 20 * rounds)
    near, far = caches
    figures = {name: round(statistics.median(of) * 1e3, 3) for name, of in seconds.items()}
    return {"milliseconds": figures, "far_over_near": round(ratio(seconds, far, near), 3)}


def bench_decode(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Compare decoding after few and after many tokens."""
    rows = [run(decode_speed, 1_000_000, rounds)]
    say("decode", rows[0])
    return rows


def divergence_step(length: int, window: int) -> dict[str, Callable[[], object]]:
    """Return the attention layer, its projections alone, and `attention_divergence`, each with a backward pass."""
    config = HybridMemConfig(hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=DIM, attention_window=window)
    config._attn_implementation = "sdpa"
    attention = ShortRangeAttention(config, 0, window)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.02)
    x = torch.randn(1, length, WIDTH, requires_grad=True)
    position = torch.arange(length)[None]
    sequence = TokenSequence(*rotary_angles(position, config.rotary_dim, config.rope_theta, x.dtype))
    q, k, q_ref, k_ref = (torch.randn(1, HEADS, length, DIM) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k)]
    grad = torch.randn(1, length, WIDTH)

    def attend() -> object:
        leaves = [x, *attention.parameters()]
        return torch.autograd.grad(attention(x, None, sequence)[0], leaves, grad)

    def compare() -> object:
        stats = attention_divergence(q, k, q_ref, k_ref, window=window, window_ref=window)
        return torch.autograd.grad(stats.divergence.sum(), inputs)

    def project() -> object:
        weights = [attention.qkv_proj.weight, attention.o_proj.weight]
        return torch.autograd.grad(attention.o_proj(attention.qkv_proj(x)[..., :WIDTH]), [x, *weights], grad)

    return {"layer": attend, "projections": project, "divergence": compare}


def divergence_speed(rounds: int) -> Row:
    """Measure milliseconds at 4,096 tokens with a window of 256."""
    seconds = in_turn(divergence_step(4096, 256), rounds)
    figures = {name: round(statistics.median(of) * 1e3, 1) for name, of in seconds.items()}
    attention = figures["layer"] - figures["projections"]
    return {
        "milliseconds": {**figures, "attention": round(attention, 1)},
        "times_layer": round(ratio(seconds, "divergence", "layer"), 2),
        "times_attention": round(figures["divergence"] / attention, 2),
    }


def bench_divergence(rounds: int, run: Callable[..., Any]) -> list[Row]:
    """Compare the divergence of two attentions with attention itself."""
    rows = [run(divergence_speed, rounds)]
    say("divergence", rows[0])
    return rows


SECTIONS = {
    "layer": bench_layer,
    "lengths": bench_lengths,
    "products": bench_products,
    "model": bench_model,
    "decode": bench_decode,
    "divergence": bench_divergence,
}


def say(section: str, row: Row) -> None:
    """Print a line of progress."""
    print(f"{section}: {json.dumps(row)}", file=sys.stderr, flush=True)


def start(allocator: str, threads: int, precision: str, denormals: str) -> None:
    """Set up a process."""
    global _precision
    warnings.filterwarnings("ignore")  # titans-pytorch warns about flex attention
    _precision = precision
    if denormals == "flushed":
        flush_denormals()
    if allocator == "kept":
        keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def main() -> None:
    """Measure the sections, each result in its own process, and print and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="kept")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16: by autocast")
    parser.add_argument("--denormals", choices=DENORMALS, default="flushed")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    options = (arguments.allocator, arguments.threads, arguments.precision, arguments.denormals)

    def run(measure: Callable[..., Any], *what: Any) -> Any:
        with multiprocessing.get_context("spawn").Pool(1, start, options) as pool:
            return pool.apply(measure, what)

    results = {section: SECTIONS[section](arguments.rounds, run) for section in arguments.sections}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("sections", "output")}
    settings["processor"] = processor()
    text = json.dumps({"settings": settings, **results}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
