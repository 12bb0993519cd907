"""LightningDataModule of tasks with verifiable answers, for supervised rows or prompts."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hybridmem.checks import MOST_ROWS, MOST_WORKERS, at_least, one_of
from hybridmem.rl.rollouts.prompts import Prompt
from hybridmem.tasks.task import MeasuredTask, Split, Task, check_example, check_task

from .order import EndlessSampler, ResumableLoader, start_of_data, whole_steps
from .packing import IGNORED, PADDING, Row
from .tokenizer import load_tokenizer, token_byte_lengths, vocabulary_size
from .tokens import document_marks
from .trainer_state import batches_of_steps, batches_used, is_training, share_of
from .vision import load_processor, vision_prompt

MESSAGE = "0123456789abcdef"  # placeholder of the user's message in a chat template
FINGERPRINTED = 4  # examples that identify a task and its settings
Example = dict[str, Any]


class TaskDataModule(L.LightningDataModule):
    """Examples of a task, for supervised training or for reinforcement learning.

    In "supervised" mode, a batch is a dict of input_ids, shift_labels and document_ids, each (batch, time), for
    PretrainModule. Each row holds one example: prompt, answer and EOS, with labels at the answer and EOS, right-padded
    to the longest row. Examples with `images` add a tensor images (batch, patches, 64); the patches precede the text
    and have no labels, and input_ids contain the text only.

    In "prompts" mode, a batch is the list of the examples returned by `task.example`.

    Prompts are tokenised with the tokenizer's special tokens; answers continue them without any. Training is an endless
    sequence of examples that depends on `seed`, and a resumed run continues with exactly the next example. The
    validation set is fixed. Several ranks share each step, with `batch_size` examples each.

    `setup` sets `tokenizer`, `vocab_size` (the largest id + 1) and `token_byte_lengths` (the number of bytes per id).

    Args:
        task: creates the examples and rewards answers.
        batch_size: examples per rank and step.
        mode: "supervised" or "prompts".
        num_train: the number of examples in a training epoch; every epoch has the same examples in another order.
        num_val: the number of validation examples.
        seed: seeds the order of the examples; the task has its own seed.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the Hugging Face hub.
        processor: folder or name of a vision-language model, for "prompts" mode. Its processor formats the prompts,
            with an example's images as one picture, and provides the tokenizer. None puts image patches before the
            text.
        max_prompt_length: the maximum number of tokens in a prompt, or None. Longer prompts raise an error, because
            truncation could remove the question.
        train_on_prompt: also label the prompt's tokens. Prompt and answer then form one text with an unpredictable end,
            so the accuracy of answers ignores EOS.
        observation_format: the format of an environment's observation, {}, between two turns; for a chat model, it
            contains the template's special tokens.
        chat_template: format prompts with the tokenizer's chat template, as a user message.
        num_workers: the number of processes that create examples; 0 creates them in the training process.

    Raises:
        ValueError: A setting is invalid; raised by the constructor, by `setup` or for a batch.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 32,
        mode: Literal["supervised", "prompts"] = "supervised",
        num_train: int = 65_536,
        num_val: int = 256,
        seed: int = 0,
        tokenizer: str = "bytes",
        processor: str | None = None,
        max_prompt_length: int | None = None,
        train_on_prompt: bool = False,
        observation_format: str = "\n{}\n",
        chat_template: bool = False,
        num_workers: int = 0,
    ):
        super().__init__()
        check_task(task)
        at_least(1, MOST_ROWS, batch_size=batch_size)
        at_least(1, num_train=num_train, num_val=num_val, max_prompt_length=max_prompt_length)
        at_least(0, MOST_WORKERS, num_workers=num_workers)
        at_least(0, seed=seed)
        one_of(("supervised", "prompts"), mode=mode)
        if observation_format.count("{}") != 1:
            raise ValueError(
                f"observation_format={observation_format!r} must contain {{}} once, the place of the observation"
            )
        if processor is not None and chat_template:
            raise ValueError("processor applies its own chat template; set chat_template to false")
        if processor is not None and mode != "prompts":
            raise ValueError(f"processor does not support mode={mode!r}; set mode to prompts")
        self.save_hyperparameters(ignore=["task"], logger=False)  # checkpoints contain plain values only
        self.task = task
        self.processor: Any = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.resumed: dict[str, Any] = {"rows": 0, "batches": 0}

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer and create one example, so that an unsuitable task raises before training starts."""
        if self.tokenizer is not None:
            return
        if self.hparams.processor is None:
            self.tokenizer = load_tokenizer(self.hparams.tokenizer)
            if self.hparams.chat_template and self.tokenizer.chat_template is None:
                raise ValueError(
                    f"chat_template=true, but tokenizer={self.hparams.tokenizer!r} has no chat template; set "
                    "chat_template to false, or use an instruct model's tokenizer"
                )
        else:
            self.processor = load_processor(self.hparams.processor)
            self.tokenizer = self.processor.tokenizer
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.token_byte_lengths = token_byte_lengths(self.tokenizer)
        if isinstance(self.task, MeasuredTask):
            self.task.measure_with(partial(count_tokens, self.processor or self.tokenizer, self.hparams.chat_template))
        splits: tuple[Split, ...] = ("train", "val") if stage in (None, "fit") else ("val",)
        for split in splits:
            example = self.task.example(split, 0)
            check_example(self.task, example, with_answer=self.hparams.mode == "supervised")
            self.batch([example])

    def rows(self, split: Split) -> "TaskRows":
        """Return the examples of a split."""
        return TaskRows(self.task, split, self.hparams.num_train if split == "train" else self.hparams.num_val)

    def batch(self, examples: list[Example]) -> list[Example] | dict[str, Tensor]:
        """Collate examples to a batch for the mode."""
        prompts = [self.prompt(example).tokens for example in examples]
        if self.hparams.mode == "prompts":
            return examples
        rows = [self.row(prompt, example) for prompt, example in zip(prompts, examples, strict=True)]
        batch: dict[str, Tensor] = pad(rows, self.pad_id)
        if "images" in examples[0]:
            batch["images"] = torch.stack([example["images"] for example in examples])
        return batch

    def prompt(self, example: Example) -> Prompt:
        """Tokenise an example's prompt with the tokenizer, the chat template or the processor."""
        assert self.tokenizer is not None
        if self.processor is not None:
            prompt = vision_prompt(self.processor, example["prompt"], example.get("images"))
        else:
            tokens = prompt_tokens(self.tokenizer, self.hparams.chat_template, example["prompt"])
            prompt = Prompt(tokens, example.get("images"))
        limit = self.hparams.max_prompt_length
        if limit is not None and len(prompt.tokens) > limit:
            raise ValueError(
                f"max_prompt_length={limit} is too short for a prompt of {len(prompt.tokens)} tokens; raise "
                "max_prompt_length, or shorten the task's prompts"
            )
        return prompt

    def row(self, prompt: list[int], example: Example) -> Row:
        """Return prompt, answer and EOS as inputs with labels; an environment's observations have none.

        `answer_labels` cover the tokens that must be predicted for a correct answer.
        """
        answer, own = self.answer_and_mask(prompt, example)
        tokens = torch.tensor([*prompt, *answer])
        labels = tokens[1:].clone()
        labels[len(prompt) - 1 :][~torch.tensor(own)] = IGNORED
        answer_labels = labels.clone()
        answer_labels[: len(prompt) - 1] = IGNORED
        if self.hparams.train_on_prompt:
            answer_labels[-1] = IGNORED
        return {
            "input_ids": tokens[:-1],
            "shift_labels": labels if self.hparams.train_on_prompt else answer_labels,
            "answer_labels": answer_labels,
            "document_ids": torch.zeros_like(labels),
        }

    def answer_and_mask(self, prompt: list[int], example: Example) -> tuple[list[int], list[bool]]:
        """Return the answer's tokens with EOS, or all turns and observations, and a mask of the model's own tokens.

        A multi-turn example has a column `turns` of pairs (turn, observation).
        """
        if "turns" not in example:
            answer = [*self.answer_tokens(prompt, example), self.end_id]
            return answer, [True] * len(answer)
        assert self.tokenizer is not None
        tokens, own = [], []
        for said, observation in example["turns"]:
            turn = self.tokenizer(said, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            heard = self.observation_tokens(observation)
            tokens += [*turn, self.end_id, *heard]
            own += [True] * (len(turn) + 1) + [False] * len(heard)
        last = len(own) - own[::-1].index(True)  # drop the observation after the last turn
        return tokens[:last], own[:last]

    def observation_tokens(self, observation: str) -> list[int]:
        """Format and tokenise an observation; special tokens in its text are treated as plain text."""
        assert self.tokenizer is not None
        before, after = self.hparams.observation_format.split("{}")
        options = dict(add_special_tokens=False, verbose=False)
        pieces = [(before, False), (observation, True), (after, False)]
        return [
            token
            for text, plain in pieces
            for token in self.tokenizer(text, split_special_tokens=plain, **options)["input_ids"]
        ]

    def answer_tokens(self, prompt: list[int], example: Example) -> list[int]:
        """Return the answer's tokens after the prompt, without the leading space that some tokenizers add."""
        assert self.tokenizer is not None
        options = dict(split_special_tokens=True, verbose=False)
        if self.hparams.chat_template:
            return self.tokenizer(example["answer"], add_special_tokens=False, **options)["input_ids"]
        whole = self.tokenizer(example["prompt"] + example["answer"], **options)["input_ids"]
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self.tokenizer(example["answer"], add_special_tokens=False, **options)["input_ids"]

    @property
    def end_id(self) -> int:
        """Return the token that ends an answer."""
        _, end = document_marks(self.tokenizer)
        return end

    @property
    def pad_id(self) -> int:
        """Return the padding token; only document id -1 identifies padding."""
        assert self.tokenizer is not None
        return self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def train_dataloader(self) -> ResumableLoader:
        """Return an epoch's worth of the endless sequence of training examples, from the run's current position on.

        With gradient accumulation, an epoch borrows a few examples from the next one, so that it ends with an optimiser
        step.
        """
        _, processes = share_of(self.trainer)
        if self.hparams.num_train < self.hparams.batch_size * processes:
            raise ValueError(
                f"num_train={self.hparams.num_train} does not fill one batch of batch_size={self.hparams.batch_size} "
                f"on {processes} process(es); raise num_train or lower batch_size"
            )
        self.check_sequence()
        count = whole_steps(self.hparams.num_train, self.hparams.batch_size, processes, batches_of_steps(self.trainer))
        return self.loader("train", seed=self.hparams.seed, position=self.rows_read, drop_last=True, num_samples=count)

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation examples."""
        _, processes = share_of(self.trainer)
        if self.hparams.num_val % processes:
            raise ValueError(
                f"num_val={self.hparams.num_val} is not divisible by {processes} processes; set it to a multiple"
            )
        return self.loader("val")

    def predict_dataloader(self) -> ResumableLoader:
        """Return the validation examples."""
        return self.val_dataloader()

    def test_dataloader(self) -> ResumableLoader:
        """Return the validation examples."""
        return self.val_dataloader()

    def loader(
        self,
        split: Split,
        seed: int | None = None,
        position: Callable[[], int] = start_of_data,
        drop_last: bool = False,
        num_samples: int | None = None,
    ) -> ResumableLoader:
        """Return the loader of this rank's share of a split."""
        (rank, processes), rows = share_of(self.trainer), self.rows(split)
        sampler = EndlessSampler(
            len(rows), seed=seed, position=position, rank=rank, world_size=processes, num_samples=num_samples
        )
        return ResumableLoader(
            rows,
            batch_size=self.hparams.batch_size,
            sampler=sampler,
            collate_fn=self.batch,
            drop_last=drop_last,
            num_workers=self.hparams.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # spares the global generator, as in `ordered_loader`
        )

    def rows_read(self) -> int:
        """Return the number of examples of the endless sequence that training has used on all ranks."""
        _, processes = share_of(self.trainer)
        batches = batches_used(self) - self.resumed["batches"]
        return self.resumed["rows"] + batches * self.hparams.batch_size * processes

    def sequence(self) -> dict[str, int | str]:
        """Return the settings that determine the sequence of training examples."""
        return {
            "examples": fingerprint([self.task.example("train", index) for index in range(FINGERPRINTED)]),
            "seed": self.hparams.seed,
            "num_train": self.hparams.num_train,
        }

    def check_sequence(self) -> None:
        """Raise a ValueError if the sequence differs from the checkpoint's."""
        before, now = self.resumed.get("sequence"), self.sequence()
        if before not in (None, now):
            raise ValueError(
                f"the checkpoint has the training examples {before}, but this run has {now}; resume with the "
                "checkpoint's task and data settings, or start a new run from its weights with "
                "model.init_args.init_from"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the sequence and the position in it; a resumed run may change the batch size or number of ranks."""
        return {"rows": self.rows_read(), "batches": batches_used(self), "sequence": self.sequence()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the checkpoint's position if this run trains."""
        if is_training(self.trainer):
            self.resumed = state


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: bool, text: str) -> list[int]:
    """Return a prompt's tokens: a user's message in the chat template, or as the tokenizer begins texts."""
    if chat_template:
        return chat_tokens(tokenizer, text)
    return tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]


def count_tokens(tokenizer: Any, chat_template: bool, text: str) -> int:
    """Return the number of a prompt's tokens, for a tokenizer or a processor."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return len(prompt_tokens(tokenizer, chat_template, text))
    return len(vision_prompt(tokenizer, text, None).tokens)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the tokens of a user message in the tokenizer's chat template, with the generation prompt.

    Special tokens in the message itself are treated as plain text.
    """
    chat = [{"role": "user", "content": MESSAGE}]
    written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, after = written.partition(MESSAGE)
    return [
        token
        for text, plain in ((before, False), (message, True), (after, False))
        for token in tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"]
    ]


class TaskRows(Dataset[Example]):
    """Examples of a split; the index counts over epochs, and every epoch has the same examples."""

    def __init__(self, task: Task, split: Split, num_rows: int):
        self.task, self.split, self.num_rows = task, split, num_rows

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return self.num_rows

    def __getitem__(self, index: int) -> Example:
        return self.task.example(self.split, index % self.num_rows)


def pad(rows: list[dict[str, Int64[Tensor, " _"]]], pad_id: int) -> dict[str, Int64[Tensor, "batch time"]]:
    """Batch rows of different lengths with padding on the right."""
    filling = {"input_ids": pad_id, "shift_labels": IGNORED, "answer_labels": IGNORED, "document_ids": PADDING}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in filling.items()
    }


def fingerprint(examples: list[Example]) -> str:
    """Return a short hash of examples' prompts, answers and images."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example['prompt']}\0{example['answer']}\0".encode())
        if "images" in example:
            digest.update(example["images"].numpy().tobytes())
    return digest.hexdigest()[:16]
