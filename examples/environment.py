"""Train an agent in an environment of your own: python examples/environment.py (two minutes on one core).

A vault opens with a code that the agent can look up. Two in three demonstrations guess it; reward teaches the agent to
look. Over two seeds, val/reward rises from 0.15 to 1 (greedy), and val/pass@1 from 0.3 to 0.8 (sampled).
"""

from functools import partial

import lightning as L
from torch.optim import AdamW

from hybridmem import HybridMemConfig
from hybridmem.cli.console import run_script
from hybridmem.cli.progress import StepBar
from hybridmem.data import TaskDataModule
from hybridmem.rl import GRPO
from hybridmem.training import PolicyModule, PretrainModule, WarmupCosine


class Vault:
    def reset(self, code, **columns):
        self.code, self.opened, self.done = code, False, False

    def look(self) -> str:
        return str(self.code)

    def enter(self, code: int) -> str:
        self.opened, self.done = code == self.code, True
        return ""


class Opening:
    environment = Vault
    max_completion_length = 24

    def example(self, split, index):
        code, guess = index // 3 % 10, index // 30 % 10
        turns = [("look", str(code)), (f"enter {code}", "")] if index % 3 == 0 else [(f"enter {guess}", "")]
        return {"prompt": "open the vault\n", "answer": "", "code": code, "turns": turns}

    def reward(self, prompts, completions, environments, **columns):
        return [float(vault.opened) for vault in environments]


def main(warm_up: int = 250, steps: int = 40, games: int = 20, folder: str = "runs/examples/vault", seed: int = 0):
    """Train on demonstrations, then by reward.

    Args:
        warm_up: supervised steps on demonstrations.
        steps: steps by reward.
        games: games in each step and each validation.
        folder: where to save the model after the warm-up.
        seed: seed of weights and games.
    """
    L.seed_everything(seed)
    config = HybridMemConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, attention_window=32)
    schedule = partial(WarmupCosine, warmup_steps=1)
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[StepBar()])
    trainer = partial(L.Trainer, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    start = PretrainModule(config, optimizer=partial(AdamW, lr=3e-3), lr_scheduler=schedule)
    trainer(max_steps=warm_up).fit(start, TaskDataModule(Opening(), num_val=games))
    start.model.save_pretrained(folder)
    agent = PolicyModule(folder, [GRPO(beta=0.0)], optimizer=partial(AdamW, lr=1e-3), lr_scheduler=schedule, seed=seed)
    data = TaskDataModule(Opening(), mode="prompts", batch_size=games, num_val=games)
    trainer().validate(agent, data)
    trainer(max_steps=steps).fit(agent, data)
    trainer().validate(agent, data)


if __name__ == "__main__":
    run_script(main)
