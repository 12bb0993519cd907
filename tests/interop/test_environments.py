"""Environments run unchanged in TRL's GRPOTrainer and in PolicyModule."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from hybridmem.data.tokenizer import byte_tokenizer
from hybridmem.rl.environments.tools import act, parse_calls, tools_of
from hybridmem.tasks import Repair, Workspace
from tests.hybridmem.sandbox.isolation import needs_sandbox
from tests.hybridmem.tasks.test_repair import SOURCE

pytestmark = [needs_sandbox, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

GENERATIONS = 2
COLUMNS = ("prompt", "files", "path", "shown", "hidden", "answer")  # columns of TRL's dataset and arguments of reset()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(SOURCE)
    return {"workspace": Workspace(num_files=3, search=True), "repair": Repair(path=str(folder), val_fraction=0.3)}


def as_call(environment, turn: str) -> str:
    """Convert a plain turn to the chat template's JSON."""
    (call,) = parse_calls(turn, tools_of(environment), "plain")
    return f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.arguments})}\n</tool_call>"


class Demonstrated(GRPOTrainer):
    """Trainer whose policy follows the demonstration in every other trajectory, and is silent in the rest."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        texts = [self._tokenizer.decode(ids) for ids in prompt_ids]
        said = [self.says(text, number) for number, text in enumerate(texts)]
        ids = [self._tokenizer(f"{text}<|im_end|>")["input_ids"] for text in said]
        return [[*turn, self._tokenizer.eos_token_id] for turn in ids], None

    def says(self, text: str, number: int) -> str:
        told = text.count("<tool_response>")
        if not told and number % GENERATIONS:
            return "I give up"
        return self.turns[told] if told < len(self.turns) else "done"


@pytest.mark.parametrize("name", ["workspace", "repair"])
def test_an_environment_runs_in_trl_and_here(name, tasks, tmp_path):
    task = tasks[name]
    example = task.example("train", 0)
    environment = task.environment()
    environment.reset(**example)
    heard = []
    for said, _ in example["turns"]:
        step = act(environment, as_call(environment, said), "json", 10_000)
        heard.append(step.observation)
    assert step.ended
    assert environment.get_reward() == 1
    assert heard == [observation for _, observation in example["turns"]]

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    columns = {name: value for name, value in example.items() if name in COLUMNS}
    columns["prompt"] = [{"role": "user", "content": example["prompt"]}]
    sizes = dict(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    sizes["max_position_embeddings"] = 16_384  # TRL ends longer trajectories
    trainer = Demonstrated(
        model=LlamaForCausalLM(LlamaConfig(**sizes)),
        args=GRPOConfig(
            output_dir=tmp_path,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_completion_length=6000,
            max_steps=1,
            num_generations=GENERATIONS,
            per_device_train_batch_size=GENERATIONS,
            save_strategy="no",
            gradient_checkpointing=False,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([columns] * 4),
        processing_class=tokenizer,
        environment_factory=task.environment,
    )
    trainer.turns = [as_call(environment, said) for said, _ in example["turns"]]
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] == len(example["turns"]) / GENERATIONS
    assert logged["tools/failure_frequency"] == 0
    assert logged["reward"] == 1 / GENERATIONS
    assert logged[f"rewards/{task.environment.__name__}/mean"] == 1 / GENERATIONS
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
