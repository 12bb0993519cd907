"""What training and decoding cost per token at 170M to 70B parameters on 8 to 1,024 GPUs, by arithmetic alone.

    python scripts/scaling.py [--write docs/scaling.md]

Parameters, states and the operations of matrix products are counted from the models themselves; tests/scripts/
test_scaling.py holds the same formulas against counted operations and measured states of small models. Seconds follow
from a data sheet and the assumptions below. Nothing of it was run at this scale.
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
ROWS = 8  # at most, of a GPU and a micro-batch
BATCH = {"170M": 1 << 19, "760M": 1 << 19, "7B": 1 << 22, "70B": 1 << 22}  # tokens of an optimiser step
PROCESSES = (8, 64, 256, 1024)
# Assumptions. An H100 SXM is taken from its data sheet; what is reached of it is a guess.
H100, CAPACITY = GPUS["H100"], 80e9
REACHED = 0.4  # of the peak, by matrix products
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, in a node of 8 and between nodes
MASTER = 4  # bytes of a weight, and of its gradient: weights are float32, products bfloat16 (bf16-mixed)
WEIGHT_STATE = 4 * MASTER  # weight, gradient and AdamW's two moments


def configurations() -> dict[str, HybridMemConfig]:
    """Titans' sizes as they are configured, and two of the same kind."""
    titans = {}
    for name in ("170m", "760m"):
        settings = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text())
        titans[name.upper()] = HybridMemConfig(**settings["model"]["init_args"]["config"])
    shared = dict(vocab_size=32000, variant="mag", attention_window=512, attention_conv=True, num_persistent_tokens=16)
    shared |= dict(head_dim=128, memory_head_dim=128, memory_chunk_size=64)
    return titans | {
        "7B": HybridMemConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=24, num_attention_heads=32,
            num_key_value_heads=32, memory_heads=32, **shared,
        ),
        "70B": HybridMemConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=58, num_attention_heads=64,
            num_key_value_heads=8, memory_heads=64, **shared,
        ),
    }  # fmt: skip


class Operations(NamedTuple):
    """Floating-point operations of a token's forward."""

    linear: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Model:
    """A mag model's sizes; the model itself holds no numbers."""

    config: HybridMemConfig
    parameters: int
    linear: int  # weights of matrices that every token meets

    @classmethod
    def of(cls, config: HybridMemConfig) -> "Model":
        """Count a model."""
        with torch.device("meta"):
            model = HybridMemForCausalLM(config)
        linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        return cls(config, model.num_parameters(), linear)

    def forward(self) -> Operations:
        """Of a token in a row that is longer than the window, which is folded into blocks."""
        config = self.config
        keys = 2 * config.attention_window + config.num_persistent_tokens
        attention = 4 * config.num_attention_heads * config.head_dim * keys
        memory = sum(self._memory()[name] for name in ("chunk_kernel", "scan_kernel", "output_kernel"))
        return Operations(2 * self.linear, config.num_hidden_layers * attention, config.num_hidden_layers * memory)

    def training(self) -> float:
        """Forward, once more as activations are recomputed, and backward."""
        forward, memory = self.forward(), self._memory()
        backward = memory["chunk_kernel"] + sum(
            memory[f"{name}_kernel"] for name in ("seed", "adjoint", "mix_gradient", "token_gradient")
        )
        dense = 4 * (forward.linear + forward.attention)
        return dense + 2 * forward.memory + self.config.num_hidden_layers * backward

    def _memory(self) -> dict[str, float]:
        """Operations of the memory's kernels, a layer and token."""
        config = self.config
        shapes = Shapes(1, config.memory_heads, SEQUENCE, config.memory_head_dim, config.memory_chunk_size, (), 1)
        return {name: count / SEQUENCE for name, count in memory_scan_operations(shapes).items()}

    def state_bytes(self, width: int = 2) -> int:
        """What a row carries from token to token: memory in float32, keys, values and convolutions of `width` bytes."""
        config = self.config
        memory = 2 * config.memory_heads * config.memory_head_dim**2 * max(width, 4)
        keys = 2 * config.num_key_value_heads * config.head_dim
        channels = keys + config.num_attention_heads * config.head_dim if config.attention_conv else 0
        channels += 3 * config.memory_heads * config.memory_head_dim
        window = (config.attention_window - 1) * keys
        return config.num_hidden_layers * (memory + width * (window + (config.memory_conv_size - 1) * channels))

    def key_bytes(self) -> int:
        """Keys and values of a token, as full attention would keep them in bfloat16."""
        config = self.config
        return config.num_hidden_layers * 4 * config.num_key_value_heads * config.head_dim

    def activation_bytes(self) -> int:
        """What a token leaves for the backward under activation checkpointing: layers' inputs, and logits twice."""
        return 2 * self.config.num_hidden_layers * self.config.hidden_size + 8 * self.config.vocab_size


@dataclass(frozen=True)
class Step:
    """An optimiser step of data parallelism, on one GPU of several."""

    model: Model
    processes: int
    tokens: int  # of all GPUs

    @property
    def per_gpu(self) -> int:
        """Tokens of this GPU: a row at least."""
        return max(self.tokens // self.processes, SEQUENCE)

    @property
    def micro_batches(self) -> int:
        """Forwards and backwards before the optimiser steps."""
        return -(-self.per_gpu // (ROWS * SEQUENCE))

    @property
    def ddp_bytes(self) -> float:
        """Sent for a token: gradients, once a step, there and back around a ring."""
        return 2 * self._others * MASTER * self.model.parameters / self.per_gpu

    @property
    def fsdp_bytes(self) -> float:
        """Sent for a token: weights to the forward and to the backward, gradients back, in every micro-batch."""
        return 3 * self._others * MASTER * self.model.parameters * self.micro_batches / self.per_gpu

    @property
    def gpu_bytes(self) -> float:
        """Of weights, gradients, moments and activations, sharded."""
        tokens = min(self.per_gpu, ROWS * SEQUENCE)
        return WEIGHT_STATE * self.model.parameters / self.processes + tokens * self.model.activation_bytes()

    def tokens_per_second(self, sent: float) -> float:
        """Of a GPU, where what is sent overlaps with what is computed."""
        link = NVLINK if self.processes <= 8 else NETWORK
        return 1 / max(self.model.training() / (REACHED * H100.bf16), sent / link)

    @property
    def _others(self) -> float:
        return 1 - 1 / self.processes


def per_token(models: dict[str, Model]) -> str:
    """What does not depend on the number of GPUs."""
    names = ["", "parameters", "linear", "attention", "memory", "training", "a row's state", "keys of full attention"]
    units = ["", "M", "GFLOP", "GFLOP", "GFLOP", "GFLOP", "MB", f"at {LONG:,} tokens, MB"]
    lines = [_row([f"{name}, {unit}" if unit else name for name, unit in zip(names, units, strict=True)])]
    lines.append(_row(["---"] * len(names)))
    for name, model in models.items():
        operations = [f"{count / 1e9:.3g}" for count in (*model.forward(), model.training())]
        sizes = [f"{size / 1e6:,.0f}" for size in (model.state_bytes(), LONG * model.key_bytes())]
        lines.append(_row([name, f"{model.parameters / 1e6:,.0f}", *operations, *sizes]))
    return "\n".join(lines) + "\n"


def decoding(models: dict[str, Model]) -> str:
    """Bytes that a decoded token moves, and what a GPU's bandwidth makes of it."""
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
    """Every model on every number of GPUs."""
    names = ["", "GPUs", "tokens a step", "GB a GPU, sharded", "DDP, B/token", "FSDP2, B/token", "compute, µs/token"]
    names += ["FSDP2, tokens/s and GPU", "bound by"]
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
    """A sequence of a million tokens over ranks: what is handed over, beside ring attention's keys and values."""
    names = ["", "ranks", "tokens a rank", "states, B/token", "ring attention, B/token", "slots lost"]
    lines = [_row(names), _row(["---"] * len(names))]
    for name, model in models.items():
        for ranks in PROCESSES[:3]:
            handed = 2 * model.state_bytes() / (LONG / ranks)  # and the gradients of it
            ring = 3 * (ranks - 1) * model.key_bytes()  # forward, again in the backward, and gradients
            layers = model.config.num_hidden_layers
            lost = (ranks - 1) / (layers + ranks - 1)
            lines.append(_row([name, ranks, f"{LONG // ranks:,}", f"{handed:,.0f}", f"{ring:,.0f}", f"{lost:.0%}"]))
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """All of them by their marks' names."""
    models = {name: Model.of(config) for name, config in configurations().items()}
    makers = (per_token, decoding, data_parallel, context_parallel)
    return {make.__name__: make(models) for make in makers}


def rewritten(page: str) -> str:
    """The page with its tables replaced, each between its two marks."""
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
    parser.add_argument("--write", type=Path, help="a page that holds the tables between their marks")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(rewritten(arguments.write.read_text()))
    else:
        print("\n".join(tables().values()), end="")


if __name__ == "__main__":
    main()
