"""Tasks with checkable answers as a LightningDataModule: rows to learn from, or prompts to answer."""

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

MESSAGE = "0123456789abcdef"  # where a chat template puts the user's message
FINGERPRINTED = 4  # examples that tell one task, or its settings, from another
Example = dict[str, Any]


class TaskDataModule(L.LightningDataModule):
    """A task's examples, for supervised training or for reinforcement learning.

    In "supervised" mode a batch is a dict of input_ids, shift_labels and document_ids, each (batch, time), as
    PretrainModule takes them: an example to a row, prompt, answer and end of sequence, with labels at the answer
    and its end, padded on the right to the batch's longest. Examples with `images` give them as images (batch,
    patches, 64): the patches stand before the text, without labels, and input_ids hold the text alone.

    In "prompts" mode a batch is the list of the examples themselves, as `task.example` gives them.

    Prompts are tokenised as the tokenizer does by itself, with the marks that it begins texts with; answers go on
    from there without any. Training is an endless sequence of examples that `seed` fixes: a run that is resumed
    goes on with the very example that would have been next. Validation is always the same. Several processes share
    each batch, with `batch_size` examples each.

    After `setup`: `tokenizer`, `vocab_size` (its largest id + 1) and `token_byte_lengths`, the bytes of every id.

    Args:
        task: where the examples come from, and who rewards answers.
        batch_size: examples per process and step.
        mode: "supervised" or "prompts".
        num_train: examples of a training epoch; each epoch has the same ones in another order.
        num_val: examples of the validation set.
        seed: of the order of the examples; the examples follow from the task's own seed.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the Hugging Face hub.
        processor: folder or name of a vision-language model, whose processor then writes the prompts, images drawn as
            one picture, and brings the tokenizer; in "prompts" mode. None: images are patches before the text.
        max_prompt_length: tokens that a prompt may have; a longer one is an error, since cutting it could take away
            what is asked for. None: any number.
        train_on_prompt: give the prompt's tokens labels too: prompt and answer are then one text, whose end nobody can
            know, so that the accuracy of answers leaves their end out.
        observation_format: what stands around {}, the answer of an environment, between two turns; for a chat model
            its template's marks.
        chat_template: write prompts by the tokenizer's chat template, as a user's message that the model answers.
        num_workers: processes that make examples; 0 makes them in the training process.

    Raises:
        ValueError: in the constructor, in `setup` or for a batch, naming the setting to change.
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
                f"observation_format={observation_format!r} must hold {{}} once, where the observation goes"
            )
        if processor is not None and chat_template:
            raise ValueError("processor writes prompts by its own chat template: set chat_template to false")
        if processor is not None and mode != "prompts":
            raise ValueError("processor writes prompts to be answered: set mode to prompts")
        self.save_hyperparameters(ignore=["task"], logger=False)  # checkpoints hold plain values alone
        self.task = task
        self.processor: Any = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.resumed: dict[str, Any] = {"rows": 0, "batches": 0}

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer; make an example, so that a task that has none says so before training starts."""
        if self.tokenizer is not None:
            return
        if self.hparams.processor is None:
            self.tokenizer = load_tokenizer(self.hparams.tokenizer)
            if self.hparams.chat_template and self.tokenizer.chat_template is None:
                raise ValueError(
                    f"chat_template=true but tokenizer={self.hparams.tokenizer!r} has none: set it to false, or take "
                    "an instruct model's tokenizer"
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
        """The examples of a split."""
        return TaskRows(self.task, split, self.hparams.num_train if split == "train" else self.hparams.num_val)

    def batch(self, examples: list[Example]) -> list[Example] | dict[str, Tensor]:
        """Examples as the mode wants them."""
        prompts = [self.prompt(example).tokens for example in examples]
        if self.hparams.mode == "prompts":
            return examples
        rows = [self.row(prompt, example) for prompt, example in zip(prompts, examples, strict=True)]
        batch: dict[str, Tensor] = pad(rows, self.pad_id)
        if "images" in examples[0]:
            batch["images"] = torch.stack([example["images"] for example in examples])
        return batch

    def prompt(self, example: Example) -> Prompt:
        """What is asked, as the tokenizer writes it by itself, or the processor."""
        assert self.tokenizer is not None
        if self.processor is not None:
            prompt = vision_prompt(self.processor, example["prompt"], example.get("images"))
        else:
            tokens = prompt_tokens(self.tokenizer, self.hparams.chat_template, example["prompt"])
            prompt = Prompt(tokens, example.get("images"))
        limit = self.hparams.max_prompt_length
        if limit is not None and len(prompt.tokens) > limit:
            raise ValueError(
                f"max_prompt_length={limit} is too short for a prompt of {len(prompt.tokens)} tokens: raise it, or "
                "make the task's prompts shorter"
            )
        return prompt

    def row(self, prompt: list[int], example: Example) -> Row:
        """Prompt, answer and end of sequence as inputs with their labels; what an environment says has none.

        `answer_labels` are those that an answer must have to be right.
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
        """The answer's tokens with their end, or the turns and what was answered to them; and which a model says.

        An example of many turns has the column `turns`: of every turn what is said, and the environment's answer.
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
        last = len(own) - own[::-1].index(True)  # what is heard after the last turn is read by nobody
        return tokens[:last], own[:last]

    def observation_tokens(self, observation: str) -> list[int]:
        """What an environment says, as it stands between two turns; its text makes no special tokens."""
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
        """The answer's tokens as they follow the prompt's, without the space that some tokenizers begin with."""
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
        """The token that ends an answer."""
        _, end = document_marks(self.tokenizer)
        return end

    @property
    def pad_id(self) -> int:
        """What stands where there is no token; document id -1 is what marks such places."""
        assert self.tokenizer is not None
        return self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def train_dataloader(self) -> ResumableLoader:
        """The endless sequence of training examples from where the run stands, an epoch's worth of it.

        With gradient accumulation an epoch takes a few examples of the next one, to end with an optimiser step.
        """
        _, processes = share_of(self.trainer)
        if self.hparams.num_train < self.hparams.batch_size * processes:
            raise ValueError(
                f"num_train={self.hparams.num_train} does not fill one batch of batch_size={self.hparams.batch_size} "
                f"on {processes} process(es): raise num_train or lower batch_size"
            )
        self.check_sequence()
        count = whole_steps(self.hparams.num_train, self.hparams.batch_size, processes, batches_of_steps(self.trainer))
        return self.loader("train", seed=self.hparams.seed, position=self.rows_read, drop_last=True, num_samples=count)

    def val_dataloader(self) -> ResumableLoader:
        """The validation examples."""
        _, processes = share_of(self.trainer)
        if self.hparams.num_val % processes:
            raise ValueError(
                f"num_val={self.hparams.num_val} cannot be shared evenly by {processes} processes: set a multiple"
            )
        return self.loader("val")

    def predict_dataloader(self) -> ResumableLoader:
        """The validation examples."""
        return self.val_dataloader()

    def test_dataloader(self) -> ResumableLoader:
        """The validation examples."""
        return self.val_dataloader()

    def loader(
        self,
        split: Split,
        seed: int | None = None,
        position: Callable[[], int] = start_of_data,
        drop_last: bool = False,
        num_samples: int | None = None,
    ) -> ResumableLoader:
        """This process's share of a split, in batches."""
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
            generator=torch.Generator().manual_seed(0),  # as in `ordered_loader`: no draw from the global one
        )

    def rows_read(self) -> int:
        """How many examples of the endless sequence training has used, over all processes."""
        _, processes = share_of(self.trainer)
        batches = batches_used(self) - self.resumed["batches"]
        return self.resumed["rows"] + batches * self.hparams.batch_size * processes

    def sequence(self) -> dict[str, int | str]:
        """What the sequence of training examples follows from."""
        return {
            "examples": fingerprint([self.task.example("train", index) for index in range(FINGERPRINTED)]),
            "seed": self.hparams.seed,
            "num_train": self.hparams.num_train,
        }

    def check_sequence(self) -> None:
        """Refuse to go on in another sequence than the checkpoint's."""
        before, now = self.resumed.get("sequence"), self.sequence()
        if before not in (None, now):
            raise ValueError(
                f"the checkpoint's training examples were {before}, those of this run are {now}: resume with the task "
                "and the data settings of the checkpoint, or start a new run from its weights: "
                "model.init_args.init_from"
            )

    def state_dict(self) -> dict[str, Any]:
        """How much of which sequence was used. It goes on with another batch size or number of processes."""
        return {"rows": self.rows_read(), "batches": batches_used(self), "sequence": self.sequence()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint's run ended, if this one trains."""
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
    """Return a user's message in the tokenizer's chat template, up to where the model answers.

    Special tokens in the message itself are text.
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
    """A split's examples. The index counts on from epoch to epoch; the examples of every epoch are the same."""

    def __init__(self, task: Task, split: Split, num_rows: int):
        self.task, self.split, self.num_rows = task, split, num_rows

    def __len__(self) -> int:
        """Examples of an epoch."""
        return self.num_rows

    def __getitem__(self, index: int) -> Example:
        return self.task.example(self.split, index % self.num_rows)


def pad(rows: list[dict[str, Int64[Tensor, " _"]]], pad_id: int) -> dict[str, Int64[Tensor, "batch time"]]:
    """Rows of different lengths as one batch, padded on the right."""
    filling = {"input_ids": pad_id, "shift_labels": IGNORED, "answer_labels": IGNORED, "document_ids": PADDING}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in filling.items()
    }


def fingerprint(examples: list[Example]) -> str:
    """A short text that differs where prompts, answers or images do."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example['prompt']}\0{example['answer']}\0".encode())
        if "images" in example:
            digest.update(example["images"].numpy().tobytes())
    return digest.hexdigest()[:16]
