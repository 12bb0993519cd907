"""Train a model by a reward of your own, on its tokens and on its attention.

    python examples/train_on_files.py
    python examples/rl_on_my_reward.py --model runs/examples/text

The model completes a line of Python. A line that ends in time earns a half, and one that parses a half.
"""

import ast
from functools import partial

import lightning as L
import torch

from hybridmem.cli.console import run_script
from hybridmem.cli.progress import StepBar
from hybridmem.data import TaskDataModule
from hybridmem.rl import GRPO, AttentionRL
from hybridmem.training import PolicyModule, WarmupCosine


class Lines:
    max_completion_length = 24  # bytes

    def example(self, split, index):
        return {"prompt": ("def ", "import ", "class ", "if ")[index % 4], "answer": ""}

    def reward(self, prompts, completions, **columns):
        pairs = zip(prompts, completions, strict=True)
        return [("\n" in text) / 2 + parses(prompt + text.split("\n")[0]) / 2 for prompt, text in pairs]


def parses(line: str) -> bool:
    try:
        ast.parse(line + " pass" if line.endswith(":") else line)
    except (SyntaxError, ValueError):
        return False
    return True


def main(model: str, steps: int = 60, batch: int = 8, group: int = 16, output: str = "runs/examples/rl"):
    """Train by reward, and validate before and after.

    Args:
        model: folder that train_on_files saved, or another byte-level model.
        steps: optimiser steps.
        batch: prompts in each rollout.
        group: responses to each prompt.
        output: folder of the trained model.
    """
    L.seed_everything(0)
    module = PolicyModule(
        model,
        objectives=[GRPO(beta=0.0), AttentionRL(weight=1.0)],
        num_generations=group,
        steps_per_generation=2,
        optimizer=partial(torch.optim.AdamW, lr=3e-4),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
    )
    data = TaskDataModule(Lines(), mode="prompts", batch_size=batch, num_val=4, tokenizer=model)
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[StepBar()])
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", **quiet)
    trainer.validate(module, data)
    trainer.fit(module, data)
    trainer.validate(module, data)
    module.model.save_pretrained(output)


if __name__ == "__main__":
    run_script(main)
