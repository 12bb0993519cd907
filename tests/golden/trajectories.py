"""Golden trajectories: tiny seeded runs through public entry points, recorded to the last bit.

`python -m tests.golden.trajectories --write` rewrites golden.json. The runs execute in a separate process, in which no
operation depends on the number of cores or on the processor's vector instructions.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.data import TaskDataModule, TextDataModule
from hybridmem.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SFT,
    AttentionDistillation,
    AttentionRL,
    CritiqueGRPO,
    CritiqueGRPOReleased,
    DrGRPO,
    IndicativeCritic,
    RejectionFineTune,
    SWEDapo,
)
from hybridmem.rl.environments.tools import act
from hybridmem.rl.rollouts.multi_turn import Reply, sample_turns
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.training import PolicyModule, PretrainModule, WarmupCosine

from .recording import Notes, Record, adamw, tensor_record
from .tasks import END_IDS, WORDS, Doors, TwoDoors, Words, write_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
STEPS = 6  # optimiser steps of reinforcement learning
PRETRAINING_STEPS = 20
SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attention_window=7,
    segment_length=6,
    num_persistent_tokens=2,
    memory_heads=2,
    memory_head_dim=8,
    memory_chunk_size=8,
)
CRITIQUES = dict(critic=IndicativeCritic(wrong="no", right="now"), template="{prompt} {response} {critique}")
QUIET = dict(
    accelerator="cpu",
    log_every_n_steps=1,
    num_sanity_val_steps=0,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
Scenario = Callable[[Path], Record]


def pretrain(folder: Path, mode: str = "packed", **config: Any) -> Record:
    """Pretrain a byte model on a small text, with one validation at the end."""
    notes = Notes()
    module = PretrainModule(
        HybridMemConfig(**{**SHAPE, **config}),
        optimizer=adamw(notes),
        lr_scheduler=partial(WarmupCosine, warmup_steps=2),
        carry_state=mode == "continuous",
        position_edges=[0, 8, 16],
    )
    data = TextDataModule(
        path=str(write_text(folder / "text")),
        pattern="*.txt",
        sequence_length=32,
        batch_size=2,
        val_fraction=0.2,
        mode=mode,
    )
    trainer(
        folder,
        notes,
        max_steps=PRETRAINING_STEPS,
        gradient_clip_val=1.0,
        val_check_interval=PRETRAINING_STEPS,
        check_val_every_n_epoch=None,
    ).fit(module, data)
    return notes.record(module.state_dict())


def learn(folder: Path, *objectives: Any, task: Any = None, model: str = "mag", **settings: Any) -> Record:
    """Train a policy for a few optimiser steps on its own responses, or on given answers."""
    notes = Notes()
    module, data = policy(folder, notes, objectives, task or Words(), model, **settings)
    trainer(folder, notes, max_steps=STEPS, limit_val_batches=0).fit(module, data)
    return notes.record(module.state_dict())


def distil(folder: Path, **settings: Any) -> Record:
    """Distil a policy from a teacher of another model family, with different heads and layers."""
    shape = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=3, num_attention_heads=6, head_dim=8)
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, initializer_range=0.3))
    teacher.save_pretrained(folder / "teacher")
    write_tokenizer(folder / "teacher")
    return learn(folder, AttentionDistillation(teacher=str(folder / "teacher"), **settings), num_generations=2)


def validate(folder: Path, task: Any, model: str = "mag") -> Record:
    """Validate an untrained policy."""
    notes = Notes()
    module, data = policy(folder, notes, [GRPO(beta=0.0)], task, model)
    trainer(folder, notes).validate(module, data, verbose=False)
    return notes.record(module.state_dict())


def act_out(folder: Path, model: str) -> Record:
    """Sample multi-turn trajectories from prompts of unequal length."""
    data = TaskDataModule(
        TwoDoors(), mode="prompts", tokenizer=write_tokenizer(folder), observation_format="hear {} now"
    )
    data.setup("validate")
    examples = [data.task.example("val", index) for index in range(4)]
    environments = [Doors() for _ in range(4 * len(examples))]
    for number, environment in enumerate(environments):
        environment.reset(**examples[number // 4])

    def respond(number: int, tokens: list[int]) -> Reply:
        step = act(environments[number], data.tokenizer.decode(tokens), "plain", 100)
        heard = [] if step.ended else data.observation_tokens(step.observation)
        return Reply(heard, failed=step.failures > 0, ended=step.ended)

    trajectories = sample_turns(
        untrained(model).eval(),
        pad_prompts([data.prompt(example).tokens for example in examples], data.pad_id, torch.device("cpu")),
        num_generations=4,
        sampling=Sampling(max_completion_length=24),
        max_turns=4,
        respond=respond,
        eos_token_ids=END_IDS,
        pad_token_id=data.pad_id,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    )
    found = trajectories.completions
    return {
        "ids": tensor_record(found.ids),
        "mask": tensor_record(found.mask),
        "truncated": tensor_record(found.truncated),
        "turns": tensor_record(trajectories.turns),
        "faulty": tensor_record(trajectories.faulty),
        "sampled_logps": tensor_record(found.sampled_logps[found.mask]),
    }


PRETRAINING: dict[str, Scenario] = {
    "pretrain mag": partial(pretrain, variant="mag"),
    "pretrain mac": partial(pretrain, variant="mac"),
    "pretrain mag depth 2": partial(pretrain, variant="mag", memory_depth=2),
    "pretrain mag carried": partial(pretrain, variant="mag", mode="continuous"),
    "pretrain mac carried": partial(pretrain, variant="mac", mode="continuous"),
}
ON_TOKENS: dict[str, Scenario] = {
    "GRPO": lambda folder: learn(folder, GRPO(beta=0.0)),
    "GRPO with a reference": lambda folder: learn(folder, GRPO(beta=0.1)),
    "GRPO with LoRA": lambda folder: learn(folder, GRPO(beta=0.1), lora={"r": 2, "target_modules": "all-linear"}),
    "GRPO filtered": lambda folder: learn(folder, GRPO(beta=0.0), temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
    "DrGRPO": lambda folder: learn(folder, DrGRPO()),
    "DAPO": lambda folder: learn(folder, DAPO(), task=Words(binary=True)),
    "GSPO": lambda folder: learn(folder, GSPO()),
    "CISPO": lambda folder: learn(folder, CISPO(), task=Words(binary=True)),
    "CritiqueGRPO": lambda folder: learn(folder, CritiqueGRPO(**CRITIQUES), task=Words(binary=True)),
    "CritiqueGRPOReleased": lambda folder: learn(folder, CritiqueGRPOReleased(**CRITIQUES), task=Words(binary=True)),
    "SFT": lambda folder: learn(folder, SFT()),
}
IN_AN_ENVIRONMENT: dict[str, Scenario] = {
    "SWEDapo": lambda folder: learn(folder, SWEDapo(free_turns=1), task=TwoDoors(), num_generations=8),
    "SWEDapo and AttentionRL": lambda folder: learn(
        folder, SWEDapo(free_turns=1), AttentionRL(), task=TwoDoors(), num_generations=8
    ),
    "RejectionFineTune": lambda folder: learn(folder, RejectionFineTune(), task=TwoDoors(), num_generations=8),
    "turns of mag": partial(act_out, model="mag"),
    "turns of mac": partial(act_out, model="mac"),
}
ON_ATTENTION: dict[str, Scenario] = {
    "AttentionRL": lambda folder: learn(folder, AttentionRL()),
    "AttentionRL explored": lambda folder: learn(
        folder, AttentionRL(exploration=0.5, positions="predicting"), num_iterations=1
    ),
    "AttentionRL on allocation, explored": lambda folder: learn(
        folder, AttentionRL(target="allocation", exploration=0.5, layers=[0, 1], entropy_bonus=0.1)
    ),
    "AttentionRL on memory, explored": lambda folder: learn(
        folder, AttentionRL(target="memory", exploration=0.5, divergence="kl"), task=Words(length=9), model="mac"
    ),
    "AttentionRL on unified": lambda folder: learn(folder, AttentionRL(target="unified", min_span=4)),
    "GRPO and AttentionRL": lambda folder: learn(
        folder, GRPO(beta=0.0), AttentionRL(), steps_per_generation=2, num_generations=8
    ),
    "GRPO and AttentionRL of mac": lambda folder: learn(
        folder, GRPO(beta=0.0), AttentionRL(), task=Words(length=9), model="mac"
    ),
    "GRPO and AttentionRL of Llama": lambda folder: learn(folder, GRPO(beta=0.0), AttentionRL(), model="llama"),
}
DISTILLATION: dict[str, Scenario] = {
    "AttentionDistillation": distil,
    "AttentionDistillation of unified": partial(distil, target="unified", mu=0.5, gamma=1.0, beta=0.0),
}
VALIDATION: dict[str, Scenario] = {
    "validate": lambda folder: validate(folder, Words()),
    "validate in an environment": lambda folder: validate(folder, TwoDoors(), "mac"),
}
SCENARIOS = {**PRETRAINING, **ON_TOKENS, **IN_AN_ENVIRONMENT, **ON_ATTENTION, **DISTILLATION, **VALIDATION}


def policy(
    folder: Path, notes: Notes, objectives: Sequence[Any], task: Any, model: str, **settings: Any
) -> tuple[PolicyModule, TaskDataModule]:
    """Return a policy with the weights of an untrained model and the data of a task."""
    untrained(model).save_pretrained(folder / "policy")
    own = [] if hasattr(task, "environment") else [task.reward]
    module = PolicyModule(
        str(folder / "policy"),
        list(objectives),
        reward_funcs=[*own, notes.sampled_tokens],
        max_turns=4,
        optimizer=adamw(notes),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
        **{"num_generations": 4, "num_iterations": 2, **settings},
    )
    data = TaskDataModule(
        task,
        mode="prompts",
        batch_size=4,
        num_val=8,
        tokenizer=write_tokenizer(folder / "tokenizer"),
        observation_format="hear {} now",
    )
    return module, data


def untrained(kind: str) -> Any:
    """Return a seeded HybridMem or Llama model with weights large enough for every part to matter."""
    torch.manual_seed(0)
    if kind == "llama":
        shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, initializer_range=0.3))
    else:
        model = HybridMemForCausalLM(
            HybridMemConfig(vocab_size=len(WORDS), variant=kind, **SHAPE, initializer_range=0.3)
        )
    model.generation_config.eos_token_id = END_IDS
    return model


def trainer(folder: Path, notes: Notes, **settings: Any) -> L.Trainer:
    """Return a trainer that writes no files."""
    return L.Trainer(**QUIET, logger=notes, callbacks=[notes.gradients], default_root_dir=folder, **settings)


def write_text(folder: Path) -> Path:
    """Write a folder of small files with different lines."""
    folder.mkdir(parents=True)
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"value_{n} = {n * 7919} # line\n" * (10 + n))
    return folder


def run(name: str) -> Record:
    """Run a scenario with its own seed and folder."""
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(0, verbose=False)
        return SCENARIOS[name](Path(folder))


def machine() -> dict[str, str]:
    """Return the processor and library versions that determine the numbers."""
    return {
        "processor": processor(),
        "libc": "-".join(platform.libc_ver()),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """Return the processor's model, from /proc/cpuinfo if it exists."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record_in_a_process(output: Path, *names: str) -> dict[str, Any]:
    """Run the named scenarios, or all, in a fresh process with pinned arithmetic."""
    command = [sys.executable, "-m", "tests.golden.trajectories", "--output", str(output), *names]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **PINNED}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(output.read_text())


def record(names: Sequence[str]) -> dict[str, Any]:
    """Run scenarios in this process."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return {"machine": machine(), "scenarios": {name: run(name) for name in names or SCENARIOS}}


def dumped(recorded: dict[str, Any]) -> str:
    """Return a record as JSON with one line per series."""
    return _indented(recorded, depth=4) + "\n"


def _indented(value: Any, depth: int, indent: str = "") -> str:
    if not isinstance(value, dict) or not depth or not value:
        return json.dumps(value)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(key)}: {_indented(part, depth - 1, inner)}" for key, part in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def main() -> None:
    """Record all scenarios in golden.json, or some in another file."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.trajectories", description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="record golden.json anew")
    action.add_argument("--output", type=Path, help="run in this process, and write the record here")
    parser.add_argument("names", nargs="*", help="scenarios of --output; all unless some are named")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.write_text(dumped(record(arguments.names)))
        return
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(dumped(record_in_a_process(Path(folder) / "golden.json")))


if __name__ == "__main__":
    main()
