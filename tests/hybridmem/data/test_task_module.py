import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from hybridmem.data import TaskDataModule, load_tokenizer
from hybridmem.tasks import Recall, Task, VisualSearch
from hybridmem.tasks.task import Split, check_task
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

from .helpers import LIGHTNING_WARNINGS, byte_level_bpe, gapped_tokenizer, sentencepiece_bpe, trainer

IGNORED, PADDING = -100, -1
EOS = 258
pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:GPU available")]


class Words:
    """Task with prompts and answers of different lengths."""

    def example(self, split: str, index: int) -> dict:
        return {"prompt": f"{split} {'x' * (index % 5)}?", "answer": str(index), "index": index}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
        return [0.0] * len(completions)

    @property
    def max_completion_length(self) -> int:
        return 9


def data(task: Task | None = None, **options) -> TaskDataModule:
    module = TaskDataModule(task or Words(), **{"batch_size": 4, "num_train": 24, "num_val": 8, **options})
    module.setup()
    return module


def read(batch: dict, row: int, tokenizer="bytes") -> tuple[str, str]:
    """Return the text of a row without padding, and the text of its labels."""
    tokenizer = load_tokenizer(tokenizer)
    inputs = batch["input_ids"][row][batch["document_ids"][row] != PADDING]
    labels = batch["shift_labels"][row][batch["shift_labels"][row] != IGNORED]
    return tokenizer.decode(inputs), tokenizer.decode(labels)


def test_supervised_rows():
    module = data()
    batch = next(iter(module.val_dataloader()))
    assert set(batch) == {"input_ids", "shift_labels", "answer_labels", "document_ids"}
    assert torch.equal(batch["answer_labels"], batch["shift_labels"])
    assert all(value.dtype == torch.int64 for value in batch.values())
    for row in range(4):
        example = module.task.example("val", row)
        assert read(batch, row) == (example["prompt"] + example["answer"], example["answer"] + "<|eos|>")
        size = int((batch["document_ids"][row] != PADDING).sum())
        assert (batch["document_ids"][row, :size] == 0).all()
        assert (batch["input_ids"][row, size:] == 256).all()
        assert (batch["shift_labels"][row, size:] == IGNORED).all()
        labels = batch["shift_labels"][row, :size]
        predicted = labels[:-1] != IGNORED
        assert torch.equal(labels[:-1][predicted], batch["input_ids"][row, 1:size][predicted])
        assert labels[-1] == EOS
    longest = max(len(module.task.example("val", row)["prompt"]) for row in range(4))
    assert batch["input_ids"].shape == (4, longest + 1)


class NoReward:
    max_completion_length = 3

    def example(self, split: Split, index: int) -> dict[str, Any]:
        return {"prompt": "x", "answer": "y"}


class NoLength(NoReward):
    max_completion_length = property()

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


class LengthAsMethod(NoLength):
    def max_completion_length(self) -> int:
        return 3


class LengthAsText(NoLength):
    max_completion_length = "3"


class NumberForReward(NoReward):
    reward = 0.5


class TextForExample(NoLength):
    max_completion_length = 3
    example = "prompt"


class Unannotated(NoLength):
    max_completion_length = 3

    def example(self, split, index):
        return {"prompt": "x", "answer": "y"}


def factory():
    return Words()


FLAWS = [
    (NoReward, r"NoReward is not a task: it lacks the method reward\(.*\), which must return a list with a float"),
    (
        NumberForReward,
        r"NumberForReward is not a task: its reward has type float; reward\(.*\) must",
    ),
    (
        TextForExample,
        r"TextForExample is not a task: its example has type str; example\(split, index\) must",
    ),
    (
        NoLength,
        r"NoLength is not a task: it lacks the property max_completion_length, which must return a positive int",
    ),
    (LengthAsMethod, r"LengthAsMethod is not a task: its max_completion_length is a method; make it a property"),
    (LengthAsText, r"LengthAsText is not a task: its max_completion_length is '3'; it must return a positive int"),
]


@pytest.mark.parametrize(("task", "message"), FLAWS, ids=lambda x: getattr(x, "__name__", ""))
def test_errors_name_the_missing_members_of_a_task(task, message):
    with pytest.raises(ValueError, match=message):
        check_task(task())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (NoReward, "NoReward is not a task: it lacks the method reward("),
        (NumberForReward, "NumberForReward is not a task: its reward has type float"),
        (TextForExample, "TextForExample is not a task: its example has type str"),
        (LengthAsMethod, "LengthAsMethod is not a task: its max_completion_length is a method"),
        (LengthAsText, "LengthAsText is not a task: its max_completion_length is '3'"),
        (Unannotated, "declare def example(self, split: Literal['train', 'val'], index: int) -> dict[str, Any]"),
        (factory, "is not a class; set the class of a task"),
    ],
)
def test_a_class_that_is_no_task_is_refused_in_one_line(task, message, tmp_path, monkeypatch, capsys):
    assert message in refusal_of(task, tmp_path, monkeypatch, capsys)


def refusal_of(task, tmp_path, monkeypatch, capsys) -> str:
    """Return the command line's error for a task."""
    init_args = {"task": {"class_path": f"{__name__}.{task.__name__}"}}
    settings = {"class_path": "hybridmem.data.TaskDataModule", "init_args": init_args}
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, data=settings))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "returned NoneType; it must return a dict"),
        ({"answer": "x"}, "returned nothing as 'prompt'; it must return a dict"),
        ({"prompt": 3, "answer": "x"}, "returned int as 'prompt'"),
        ({"prompt": "x"}, "returned nothing as 'answer'"),
    ],
)
def test_examples_without_prompt_or_answer_are_refused(example, message):
    task = Words()
    task.example = lambda split, index: example
    with pytest.raises(ValueError, match=rf"Words.example\(split, index\) {message}"):
        data(task)


def test_labels_on_the_prompt():
    batch = next(iter(data(train_on_prompt=True).val_dataloader()))
    inputs, labels = read(batch, 1)
    assert labels == inputs[1:] + "<|eos|>"
    answer = batch["answer_labels"][1]
    assert load_tokenizer("bytes").decode(answer[answer != IGNORED]) == Words().example("val", 1)["answer"]


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe])
def test_any_tokenizer(tmp_path, make):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    module = data(tokenizer=str(tmp_path))
    assert module.vocab_size == len(module.token_byte_lengths) == len(tokenizer)
    batch = next(iter(module.val_dataloader()))
    for row in range(4):
        example = module.task.example("val", row)
        inputs, labels = read(batch, row, str(tmp_path))
        assert inputs.strip() == example["prompt"] + example["answer"]
        assert labels == example["answer"] + tokenizer.eos_token
        prompt = tokenizer(example["prompt"])["input_ids"]
        assert batch["input_ids"][row, : len(prompt)].tolist() == prompt


def test_a_vocabulary_with_gaps(tmp_path):
    gapped_tokenizer().save_pretrained(tmp_path)
    module = data(tokenizer=str(tmp_path))
    assert module.vocab_size == len(module.token_byte_lengths) == 70_051
    batch = next(iter(module.val_dataloader()))
    assert batch["input_ids"].max() < 70_051
    assert module.pad_id == module.end_id == 70_050


def test_names_of_special_tokens_are_text():
    class Marks(Words):
        def example(self, split: str, index: int) -> dict:
            return {"prompt": "<|eos|>", "answer": "<|pad|>"}

    batch = next(iter(data(Marks()).val_dataloader()))
    assert (batch["input_ids"] < 256).all()
    assert batch["input_ids"].shape == (4, 14)


def test_images_are_batched_separately():
    module = data(VisualSearch(grid=3))
    batch = next(iter(module.val_dataloader()))
    assert batch["images"].shape == (4, 9, 64)
    for row in range(4):
        example = module.task.example("val", row)
        assert torch.equal(batch["images"][row], example["images"])
        assert read(batch, row)[0] == example["prompt"] + example["answer"]


def test_prompts_are_the_examples_themselves():
    module = data(mode="prompts")
    assert next(iter(module.val_dataloader())) == [module.task.example("val", index) for index in range(4)]
    seen = [example["index"] for batch in module.train_dataloader() for example in batch]
    assert sorted(seen) == list(range(24))
    assert seen != sorted(seen)


def test_the_order_follows_from_the_seed():
    def order(seed: int) -> list[int]:
        return [example["index"] for batch in data(mode="prompts", seed=seed).train_dataloader() for example in batch]

    assert order(1) == order(1) != order(2)


def test_batches_made_by_workers_are_the_same():
    alone, helped = (list(data(num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(alone, helped, strict=True))


def test_refusals(tmp_path):
    for options, message in [
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(max_prompt_length=5), "max_prompt_length=5 is too short for a prompt of 7 tokens"),
        (dict(tokenizer=str(tmp_path)), "cannot load tokenizer="),
    ]:
        with pytest.raises(ValueError, match=message):
            data(**options)
    with pytest.raises(ValueError, match="num_train=3 does not fill one batch of batch_size=4"):
        data(num_train=3).train_dataloader()
    with pytest.raises(ValueError, match="max_prompt_length=8 is too short for a prompt of"):
        list(data(mode="prompts", max_prompt_length=8).train_dataloader())


class Recorder(L.LightningModule):
    """Recorder of every training example's index."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: list[dict], batch_idx: int) -> torch.Tensor:
        self.seen += [example["index"] for example in batch]
        self.log("steps", 1.0, batch_size=len(batch))
        return self.weight * 1.0

    def validation_step(self, batch: list[dict], batch_idx: int) -> None:
        assert [example["index"] for example in batch] == [0, 1, 2, 3]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(tmp_path, max_steps, ckpt_path=None, **options) -> tuple[L.Trainer, list[int]]:
    recorder, run = Recorder(), trainer(tmp_path, max_steps=max_steps)
    settings = {"task": Words(), "batch_size": 4, "num_train": 24, "num_val": 4, "mode": "prompts"}
    module = TaskDataModule(**settings | options)
    run.fit(recorder, module, ckpt_path=ckpt_path)
    return run, recorder.seen


@pytest.mark.parametrize("stop", [2, 6, 8])  # within the first epoch of six batches, at its end, within the second
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_continues_with_the_same_examples(tmp_path, stop, num_workers):
    everything = train(tmp_path, 15)[1]
    run, _ = train(tmp_path, stop, num_workers=num_workers)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert train(tmp_path, 15, tmp_path / "saved.ckpt", num_workers=num_workers)[1] == everything[4 * stop :]
    assert train(tmp_path, stop + 3, tmp_path / "saved.ckpt", batch_size=6)[1] == everything[4 * stop :][:18]


def test_other_examples_are_refused(tmp_path):
    run, _ = train(tmp_path, 2)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ValueError, match="resume with the checkpoint's task"):
        train(tmp_path, 4, tmp_path / "saved.ckpt", num_train=30)
    with pytest.raises(ValueError, match="resume with the checkpoint's task"):
        train(tmp_path, 4, tmp_path / "saved.ckpt", task=Recall())


RECALL = {
    "class_path": "hybridmem.data.TaskDataModule",
    "init_args": {
        "task": {"class_path": "hybridmem.tasks.Recall", "init_args": {"num_pairs": 3, "window": 8, "distance": [4]}},
        "batch_size": 2,
        "num_train": 8,
        "num_val": 4,
    },
}


def write_recall(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, data=deepcopy(RECALL), trainer__max_steps=7, **changes)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
class TestCommandLine:
    def test_fit_validate_and_export(self, tmp_path, monkeypatch):
        config = write_recall(tmp_path)
        hybridmem(monkeypatch, "fit", "--config", config)
        assert len(logged(tmp_path, "train/loss")) == 7
        checkpoint = tmp_path / "run" / "step=7.ckpt"
        for command in ("validate", "test", "predict"):
            hybridmem(monkeypatch, command, "--config", config, "--ckpt_path", checkpoint)
        assert logged(tmp_path, "test/bits_per_byte")[-1] > 0
        assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 4
        hybridmem(monkeypatch, "export", "--ckpt_path", checkpoint, "--output", tmp_path / "model")
        assert load_tokenizer(str(tmp_path / "model")).eos_token_id == EOS

    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path, monkeypatch):
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        hybridmem(monkeypatch, "fit", "--config", write_recall(whole))
        config = write_recall(resumed)
        hybridmem(monkeypatch, "fit", "--config", config, "--trainer.limit_train_batches", 4)
        for later in (resumed / "run").glob("step=[67].ckpt"):  # an epoch has four batches, so step 5 is in the second
            later.unlink()
        hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", resumed / "run" / "step=5.ckpt")
        for name, weight in weights(whole / "run" / "step=7.ckpt").items():
            assert torch.equal(weights(resumed / "run" / "step=7.ckpt")[name], weight), name
        assert logged(whole, "train/loss") == logged(resumed, "train/loss")

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"num_pairs": 99}, "num_pairs=99 of 7 bytes do not fit"),
            ({"num_paris": 2}, "num_paris"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path, monkeypatch, capsys, task, message):
        config = write_recall(tmp_path)
        settings = yaml.safe_load(config.read_text())
        settings["data"]["init_args"]["task"]["init_args"] = task
        config.write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit):
            hybridmem(monkeypatch, "fit", "--config", config)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("hybridmem: error: ")
        assert re.search(re.escape(message), last)


TEMPLATE = "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}{{ '<|bos|>assistant:' }}"


def chat_tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_chat_template(tmp_path):
    name = chat_tokenizer(tmp_path)
    module = data(tokenizer=name, chat_template=True)
    example = {"prompt": "Say <|eos|> twice", "answer": "no"}
    prompt = module.prompt(example).tokens
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(prompt) == "<|bos|>user\nSay <|eos|> twice<|eos|>\n<|bos|>assistant:"
    assert prompt.count(EOS) == 1, "special tokens in the message are text"
    row = module.row(prompt, example)
    labels = row["shift_labels"]
    assert labels[labels != IGNORED].tolist() == [*b"no", EOS]
    assert row["input_ids"].tolist() == [*prompt, *b"no"]


def test_chat_template_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="chat_template=true, but tokenizer='bytes' has no chat template"):
        data(chat_template=True)
    with pytest.raises(ValueError, match="set chat_template to false"):
        TaskDataModule(Words(), mode="prompts", processor="somewhere", chat_template=True)
