"""Train an agent in an environment of your own: tools in, observations out, reward at the end.

    python examples/environment.py

The environment hides a number and answers "low" or "high". Demonstrations count upwards; reward prefers few guesses.
"""

from functools import partial

import lightning as L
import torch
from jsonargparse import auto_cli

from hybridmem import HybridMemConfig
from hybridmem.data import TaskDataModule
from hybridmem.rl import GRPO
from hybridmem.training import PolicyModule, PretrainModule, WarmupCosine


class HiddenNumber:
    def reset(self, number, **columns):
        self.number, self.guesses, self.done = number, 0, False

    def guess(self, number: int) -> str:
        self.guesses, self.done = self.guesses + 1, number == self.number
        return "" if self.done else "low" if number < self.number else "high"

    def get_reward(self) -> float:
        return 1 / self.guesses if self.done else 0.0


class Guessing:
    environment = HiddenNumber
    max_completion_length = 128

    def example(self, split, index):
        turns = [(f"guess {n}", "low" * (n < index % 8)) for n in range(index % 8 + 1)]
        return {"prompt": "a number from 0 to 7\n", "answer": "", "number": index % 8, "turns": turns}

    def reward(self, prompts, completions, **columns):
        return [0.0] * len(completions)  # the environment's get_reward is added


def main(warm_up: int = 150, steps: int = 40, games: int = 16, tokens: int = 128, folder: str = "runs/examples/games"):
    L.seed_everything(0)
    config = HybridMemConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, attention_window=32)
    training = dict(optimizer=partial(torch.optim.AdamW, lr=1e-3), lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    trainer = partial(L.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0)
    start, data = PretrainModule(config, **training), TaskDataModule(Guessing(), num_val=games)
    trainer(max_steps=warm_up).fit(start, data)
    start.model.save_pretrained(folder)

    agent = PolicyModule(folder, [GRPO(beta=0.0)], max_turns=8, max_completion_length=tokens, **training)
    data = TaskDataModule(Guessing(), mode="prompts", batch_size=games, num_val=games)
    trainer(max_steps=steps).fit(agent, data)
    trainer().validate(agent, data)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
