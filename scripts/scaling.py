"""Estimated cost of training and decoding per token, for 170M to 70B parameters on 8 to 1,024 GPUs.

    python scripts/scaling.py [--write docs/scaling.md]

Parameters, states and operations of matrix products are counted on the models themselves. tests/scripts/
test_scaling.py checks the formulas against counted operations and measured states of small models. Seconds follow from
a data sheet and the assumptions below. Nothing was run at this scale.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem_kernels.tools.roofline import GPUS, Shapes, memory_scan_operations

ROOT = Path(__file__).parents[1]
SEQUENCE = 4096  # tokens of a training row
LONG = 1 << 20  # tokens of a sequence that is split over ranks, or read before decoding
ROWS = 8  # maximum rows per GPU and micro-batch
BATCH = {"170M": 1 << 19, "760M": 1 << 19, "7B": 1 << 22, "70B": 1 << 22}  # tokens per optimiser step
PROCESSES = (8, 64, 256, 1024)
# Assumptions: an H100 SXM according to its data sheet, and a guess of the utilisation.
H100, CAPACITY = GPUS["H100"], 80e9
REACHED = 0.4  # fraction of the peak that matrix products reach
NVLINK, NETWORK = 450e9, 50e9  # bytes per second and GPU, within a node of 8 and between nodes
MASTER = 4  # bytes per weight and per gradient: float32, with bfloat16 products (bf16-mixed)
WEIGHT_STATE = 4 * MASTER  # weight, gradient and AdamW's two moments


def configurations() -> dict[str, HybridMemConfig]:
    """Return the configurations of Titans' sizes and of two larger models."""
    titans = {}
    for name in ("170m", "760m"):
        settings = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text())
        titans[name.upper()] = HybridMemConfig(**settings["model"]["init_args"]["config"])
    shared = dict(vocab_size=32000, variant="mag", attention_window=512, attention_conv=True, num_persistent_tokens=16)
    shared |= dict(head_dim=128, memory_head_dim=128, memory_chunk_size=64)
    return titans | {
        "7B": HybridMemConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            memory_heads=32,
            **shared,
        ),
        "70B": HybridMemConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=58,
            num_attention_heads=64,
            num_key_value_heads=8,
            memory_heads=64,
            **shared,
        ),
    }


class Operations(NamedTuple):
    """Floating-point operations per token in a forward pass."""

    linear: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Model:
    """Sizes of a mag model, counted on the meta device."""

    config: HybridMemConfig
    parameters: int
    linear: int  # weights of linear layers, used by every token

    @classmethod
    def of(cls, config: HybridMemConfig) -> "Model":
        """Count the parameters of a configuration."""
        with torch.device("meta"):
            model = HybridMemForCausalLM(config)
        linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        return cls(config, model.num_parameters(), linear)

    def forward(self) -> Operations:
        """Return the operations of a token in a row longer than the window, with attention in blocks."""
        config = self.config
        keys = 2 * config.attention_window + config.num_persistent_tokens
        attention = 4 * config.num_attention_heads * config.head_dim * keys
        memory = sum(self._memory()[name] for name in ("chunk_kernel", "scan_kernel", "output_kernel"))
        return Operations(2 * self.linear, config.num_hidden_layers * attention, config.num_hidden_layers * memory)

    def training(self) -> float:
        """Return the operations of a forward pass, its recomputation and a backward pass."""
        forward, memory = self.forward(), self._memory()
        backward = memory["chunk_kernel"] + sum(
            memory[f"{name}_kernel"] for name in ("seed", "adjoint", "mix_gradient", "token_gradient")
        )
        dense = 4 * (forward.linear + forward.attention)
        return dense + 2 * forward.memory + self.config.num_hidden_layers * backward

    def _memory(self) -> dict[str, float]:
        """Return the operations of the memory's kernels per layer and token."""
        config = self.config
        shapes = Shapes(1, config.memory_heads, SEQUENCE, config.memory_head_dim, config.memory_chunk_size, (), 1)
        return {name: count / SEQUENCE for name, count in memory_scan_operations(shapes).items()}

    def state_bytes(self, width: int = 2) -> int:
        """Return the bytes of a row's state: memory in float32, and keys, values and convolutions in `width` bytes."""
        config = self.config
        memory = 2 * config.memory_heads * config.memory_head_dim**2 * max(width, 4)
        keys = 2 * config.num_key_value_heads * config.head_dim
        channels = keys + config.num_attention_heads * config.head_dim if config.attention_conv else 0
        channels += 3 * config.memory_heads * config.memory_head_dim
        window = (config.attention_window - 1) * keys
        return config.num_hidden_layers * (memory + width * (window + (config.memory_conv_size - 1) * channels))

    def key_bytes(self) -> int:
        """Return the bytes of a token's keys and values under full attention in bfloat16."""
        config = self.config
        return config.num_hidden_layers * 4 * config.num_key_value_heads * config.head_dim

    def activation_bytes(self) -> int:
        """Return the bytes per token kept by activation checkpointing: the layers' inputs, and logits twice."""
        return 2 * self.config.num_hidden_layers * self.config.hidden_size + 8 * self.config.vocab_size


@dataclass(frozen=True)
class Step:
    """Optimiser step under data parallelism, as seen by one GPU."""

    model: Model
    processes: int
    tokens: int  # over all GPUs

    @property
    def per_gpu(self) -> int:
        """Tokens per GPU, at least one row."""
        return max(self.tokens // self.processes, SEQUENCE)

    @property
    def micro_batches(self) -> int:
        """Number of forward and backward passes per optimiser step."""
        return -(-self.per_gpu // (ROWS * SEQUENCE))

    @property
    def ddp_bytes(self) -> float:
        """Bytes sent per token under DDP, a ring all-reduce of gradients once per step."""
        return 2 * self._others * MASTER * self.model.parameters / self.per_gpu

    @property
    def fsdp_bytes(self) -> float:
        """Bytes sent per token under FSDP2, two all-gathers of weights and a reduce-scatter per micro-batch."""
        return 3 * self._others * MASTER * self.model.parameters * self.micro_batches / self.per_gpu

    @property
    def gpu_bytes(self) -> float:
        """Bytes of sharded weights, gradients and moments, and of activations."""
        tokens = min(self.per_gpu, ROWS * SEQUENCE)
        return WEIGHT_STATE * self.model.parameters / self.processes + tokens * self.model.activation_bytes()

    def tokens_per_second(self, sent: float) -> float:
        """Return tokens per second and GPU, assuming that communication overlaps with computation."""
        link = NVLINK if self.processes <= 8 else NETWORK
        return 1 / max(self.model.training() / (REACHED * H100.bf16), sent / link)

    @property
    def _others(self) -> float:
        return 1 - 1 / self.processes


def per_token(models: dict[str, Model]) -> str:
    """Return a table of costs that do not depend on the number of GPUs."""
    names = ["", "parameters, M", "linear", "attention", "memory", "training", "state, MB", "keys, MB"]
    lines = [_row(names), _row(["---"] * len(names))]
    for name, model in models.items():
        operations = [f"{count / 1e9:.3g}" for count in (*model.forward(), model.training())]
        sizes = [f"{size / 1e6:,.0f}" for size in (model.state_bytes(), LONG * model.key_bytes())]
        lines.append(_row([name, f"{model.parameters / 1e6:,.0f}", *operations, *sizes]))
    return "\n".join(lines) + "\n"


def decoding(models: dict[str, Model]) -> str:
    """Return a table of bytes moved per decoded token, and the tokens per second that a GPU's bandwidth permits."""
    names = ["", "weights, GB", "state, GB", "tokens/s", "full attention's keys, GB", "its tokens/s"]
    lines = [_row(names), _row(["---"] * len(names))]
    for name, model in models.items():
        weights, state, keys = 2 * model.parameters, 2 * model.state_bytes(), LONG * model.key_bytes()
        speeds = [f"{H100.bandwidth / (weights + moved):,.0f}" for moved in (state, keys)]
        lines.append(
            _row([name, *(f"{x / 1e9:.3g}" for x in (weights, state)), speeds[0], f"{keys / 1e9:.3g}", speeds[1]])
        )
    return "\n".join(lines) + "\n"


def data_parallel(models: dict[str, Model]) -> str:
    """Return a table of data parallelism for every model and number of GPUs."""
    names = ["", "GPUs", "tokens a step", "GB", "DDP, B/token", "FSDP2, B/token", "µs", "tokens/s", "bound by"]
    lines = [_row(names), _row(["---"] * len(names))]
    for name, model in models.items():
        for processes in PROCESSES:
            step = Step(model, processes, BATCH[name])
            speed, compute = step.tokens_per_second(step.fsdp_bytes), model.training() / (REACHED * H100.bf16)
            fits = step.gpu_bytes <= CAPACITY
            bound = "compute" if speed * compute > 0.999 else "communication"
            figures = [f"{step.gpu_bytes / 1e9:,.0f}{'' if fits else ' (too much)'}"]
            figures += [f"{x:,.0f}" for x in (step.ddp_bytes, step.fsdp_bytes)]
            figures += [f"{compute * 1e6:,.1f}", *([f"{speed:,.0f}", bound] if fits else ["", ""])]
            lines.append(_row([name, processes, f"{step.per_gpu * processes:,}", *figures]))
    return "\n".join(lines) + "\n"


def context_parallel(models: dict[str, Model]) -> str:
    """Return a table of a million-token sequence over ranks, with its traffic and that of ring attention."""
    names = ["", "ranks", "tokens a rank", "states, B/token", "ring attention, B/token", "slots lost"]
    lines = [_row(names), _row(["---"] * len(names))]
    for name, model in models.items():
        for ranks in PROCESSES[:3]:
            handed = 2 * model.state_bytes() / (LONG / ranks)  # states and their gradients
            ring = 3 * (ranks - 1) * model.key_bytes()  # forward, recomputation and gradients
            layers = model.config.num_hidden_layers
            lost = (ranks - 1) / (layers + ranks - 1)
            lines.append(_row([name, ranks, f"{LONG // ranks:,}", f"{handed:,.0f}", f"{ring:,.0f}", f"{lost:.0%}"]))
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """Return all tables by marker name."""
    models = {name: Model.of(config) for name, config in configurations().items()}
    makers = (per_token, decoding, data_parallel, context_parallel)
    return {make.__name__: make(models) for make in makers}


def rewritten(page: str) -> str:
    """Return the page with each table replaced between its two markers."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = before + begin + lines + end + after
    return page


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="page with markers, in which to replace the tables")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(rewritten(arguments.write.read_text()))
    else:
        print("\n".join(tables().values()), end="")


if __name__ == "__main__":
    main()
