"""Stages of the quickstart, each skipped once its result exists."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

from compare_runs import AT_POSITION, draw, last, loss_by_position
from quickstart_gates import BUDGET, DRAWS, NextBytes, cache_sentence, gate_sentence, measure_gates, read_gate_arms
from quickstart_heads import Arm, measure, read_arms, sentence, write_whole
from quickstart_page import Page
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from hybridmem.cli.convert import convert
from hybridmem.cli.export import export
from hybridmem.cli.generate import generate
from hybridmem.cli.show import show
from hybridmem.compare.environment import environment
from hybridmem.compare.grid import as_arguments
from hybridmem.convert import Allocation
from hybridmem.tasks import Facts
from hybridmem.training.callbacks.allocation import draw_allocation
from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.logs import read_log

SCRIPTS = Path(__file__).parent  # for tasks that are defined here
NAMES = {"mag": "window and memory", "swa": "window alone"}
WINDOW_ONLY = "[swa, swa, swa]"
CHARACTERS = 800  # of a prompt with facts
SHOWN = 3  # questions on the page
SAMPLE = 200  # bytes
SMALLER = 4  # times as many prompts for the small model as for SmolLM2
FINISHED = "finished"
CHECKPOINTS = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{step}", "save_last": True, "every_n_train_steps": 4},
}


class StageError(Exception):
    """A command that failed; the message names it with its last line of output."""


class Stages:
    """Stages with their wall-clock and processor seconds, which add up over interruptions.

    Args:
        folder: output folder.
        console: console for one line per stage.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console, self.record = folder, console, folder / "seconds.json"
        self.seconds: dict[str, list[float]] = json.loads(self.record.read_text()) if self.record.exists() else {}

    @contextmanager
    def timed(self, title: str) -> Iterator[None]:
        """Show a stage while it runs, and then its seconds."""
        began = now()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(
            *columns,
            console=self.console,
            transient=True,
            redirect_stdout=False,  # it goes to the log
            redirect_stderr=False,
            disable=not self.console.is_terminal,
        ) as progress:
            progress.add_task(title, total=None)
            try:
                yield
            finally:
                earlier = self.seconds.get(title, [0.0, 0.0])
                parts = zip(earlier, began, now(), strict=True)
                self.seconds[title] = [round(before + end - start, 1) for before, start, end in parts]
                write_whole(self.record, json.dumps(self.seconds) + "\n")
        self.console.print(f"{title}: {self.seconds[title][0]:.0f} s", soft_wrap=True)

    def fit(self, title: str, config: Path, folder: Path, options: dict[str, Any]) -> None:
        """Train with `hybridmem fit`, or resume a run."""
        if (folder / FINISHED).exists():
            return
        options = {"trainer.default_root_dir": str(folder), "trainer.enable_progress_bar": False} | options
        started = to_go_on_from(folder)
        options |= {} if started is None else {"ckpt_path": str(started)}
        with self.timed(title):
            run("-m", "hybridmem", "fit", "--config", str(config), *as_arguments(options))
            (folder / FINISHED).touch()


def now() -> tuple[float, float]:
    """Return the wall-clock seconds, and the processor seconds of this process and its finished children."""
    return time.monotonic(), sum(os.times()[:4])


def run(*arguments: str) -> None:
    """Run a Python command; on Ctrl-C let it save its state.

    Raises:
        StageError: the command failed.
    """
    path = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        start_new_session=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        _, errors = process.communicate()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.communicate()
        raise
    finally:
        if process.poll() is None:  # a second Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    sys.stderr.buffer.write(errors)
    sys.stderr.flush()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise StageError(lines[-1] if lines else f"{' '.join(arguments[:3])} failed")


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Run all stages and write the page."""
    stages = Stages(options.output, console)
    page = Page("hybridmem: the first ten minutes")
    train_two(stages, options.config)
    add_two(stages, page)
    base, problem = find_model(stages, options.model)
    if base is None:
        console.print(
            f"SmolLM2 is missing ({problem}); the model just trained takes its place: reward chooses the heads of its "
            "gate that read the memory",
            soft_wrap=True,
        )
        learn_gates(stages, options)
        add_gates(stages, page, problem, options)
        add_reads(stages, page)
    else:
        name = "SmolLM2" if options.model is None else base.name
        allocation = Allocation.load(options.allocation)
        learn_heads(stages, base, allocation, options)
        task = Facts(length=CHARACTERS, num_facts=4)
        with_answers(stages, options.prompts, task)
        add_heads(stages, page, name, task, allocation, options.rollouts)
    add_machine(stages, page)
    path = stages.folder / "index.html"
    page.write(path)
    console.print(f"everything on one page: {path}", soft_wrap=True)


def train_two(stages: Stages, config: Path) -> None:
    """Train a model with a memory and one without for equally many steps, and export both."""
    layers: dict[str, dict[str, Any]] = {"mag": {}, "swa": {"model.init_args.config.layer_types": WINDOW_ONLY}}
    for name, options in layers.items():
        stages.fit(f"training on the standard library's source: {NAMES[name]}", config, stages.folder / name, options)
    for name in layers:
        if not (stages.folder / f"{name}_model" / "README.md").exists():  # written last
            export(stages.folder / name / "last.ckpt", stages.folder / f"{name}_model")


def add_two(stages: Stages, page: Page) -> None:
    """Draw both runs' curves, sample from the model with a memory, and add them to the page."""
    logs = {name: read_log(stages.folder / name) for name in NAMES}
    draw({NAMES[name]: log for name, log in logs.items()}, stages.folder / "curves.png")
    bits = {name: last(log["val/bits_per_byte"]) for name, log in logs.items()}
    said = f"{bits['mag']:.2f} bits per byte of held-out source with a memory, {bits['swa']:.2f} with the window alone"
    stages.console.print(said, soft_wrap=True)
    page.heading("Two models trained on this machine")
    page.text(said[0].upper() + said[1:] + ".", "answer")
    page.image(stages.folder / "curves.png", "training curves, and held-out loss by position")
    ranges = list(loss_by_position(logs["mag"]))
    rows = [[NAMES[name], *(f"{last(log[AT_POSITION + r]):.3f}" for r in ranges)] for name, log in logs.items()]
    page.table(["bytes read before", *ranges], rows)
    page.text("A sample from the model with a memory:", "soft")
    page.code(sample(stages, "mag", "def ", SAMPLE, 0.8))


def sample(stages: Stages, name: str, prompt: str, length: int, temperature: float) -> str:
    """Return a prompt with its continuation by one of the two models, from a file if it exists."""
    path = stages.folder / f"{name}_sample_{temperature}.txt"
    if not path.exists():
        with stages.timed("sampling"), redirect_stdout(io.StringIO()) as written:
            generate(stages.folder / f"{name}_model", prompt, length, temperature, stream=False)
        write_whole(path, written.getvalue())
    return path.read_text()


def find_model(stages: Stages, given: Path | None) -> tuple[Path | None, str]:
    """Return the folder of a pretrained model, downloading SmolLM2 if none is given, or None with the problem."""
    if given is not None:
        return given, ""
    folder = stages.folder / "smollm2"
    if not folder.exists():
        try:
            with stages.timed("downloading SmolLM2"):
                run("scripts/get_smollm2.py", str(folder))
        except StageError as error:
            return None, str(error).removeprefix("error: ")
    return folder, ""


def learn_heads(stages: Stages, base: Path, start: Allocation, given: argparse.Namespace) -> None:
    """Convert the model, learn from reward which heads read everything, and export the result."""
    window: dict[str, Any] = {"attention_window": start.attention_window, "num_sink_tokens": start.num_sink_tokens}
    converted, folder = stages.folder / "converted", stages.folder / "heads"
    if not converted.exists():
        with stages.timed("converting the model"):
            convert(str(base), converted, **window)
    settings = {
        "source": "none",
        "init_from": str(given.allocation),
        "initial": 0.9,
        "budget": round(1 - start.closed, 4),
    } | window
    options = {
        "trainer.max_steps": given.rollouts,
        "trainer.callbacks": [CHECKPOINTS],
        "model.init_args.model": str(converted),
        "model.init_args.num_generations": 12,
        "model.init_args.objectives": [{"class_path": "hybridmem.rl.AllocationRL", "init_args": settings}],
        "data.init_args.tokenizer": str(base),
        "data.init_args.task.init_args.length": CHARACTERS,
    }
    stages.fit("learning from reward which heads read everything", given.reward_config, folder, options)
    if not (stages.folder / "allocated" / "README.md").exists():
        with stages.timed("exporting the model"):
            export(folder / "last.ckpt", stages.folder / "allocated")


def with_answers(stages: Stages, prompts: int, task: Facts) -> None:
    """Answer held-out prompts with all heads, the learned and random ones, and record the reads of two models."""
    path, converted = stages.folder / "answers.json", stages.folder / "converted"
    learned = Allocation.load(stages.folder / "allocated" / "allocation.json")
    if len(read_arms(path)) < 3:
        with stages.timed("answering held-out questions"):
            measure(converted, learned, task, prompts, path)
    question = stages.folder / "question.txt"
    question.write_text(task.example("val", 0)["prompt"])
    record_reads(stages, converted, stages.folder / "allocated", question, "reads.html", max_new_tokens=16, chat=True)


def record_reads(stages: Stages, model: Path, other: Path, prompt: Path, name: str, **options: Any) -> None:
    """Write the page of `hybridmem show` for two models."""
    path, part = stages.folder / name, stages.folder / f"{name}.part"
    if not path.exists():
        with stages.timed("recording the tokens that both models read"):
            show(str(model), str(prompt), str(other), part, **options)
            part.replace(path)


def add_heads(stages: Stages, page: Page, name: str, task: Facts, start: Allocation, rollouts: int) -> None:
    """Add the comparison of heads, their map, answers and reads."""
    arms = read_arms(stages.folder / "answers.json")
    prompts = len(arms[0].right)
    said = sentence(arms)
    stages.console.print(f"{name}: {said} ({prompts} held-out prompts)", soft_wrap=True)
    page.heading(f"Heads of {name} that need more than a window")
    page.text(f"{said}.", "answer")
    learned = Allocation.load(stages.folder / "allocated" / "allocation.json")
    page.text(
        f"{prompts} held-out prompts of {CHARACTERS} characters with four facts, one of which is asked for. Heads that "
        f"are not chosen read a window of {start.attention_window} tokens and the first {start.num_sink_tokens}. The "
        f"reward started from {start.path}, which {start.trained.get('rollouts', 0)} rollouts had chosen, and went on "
        f"for {rollouts} rollouts that exchanged {exchanged(start, learned)} heads. The model itself stayed frozen.",
        "soft",
    )
    logits = load_checkpoint(stages.folder / "heads" / "last.ckpt")["state_dict"]["learned.Allocation.logits"]
    draw_allocation(logits.sigmoid()).savefig(stages.folder / "heads.png")
    page.image(stages.folder / "heads.png", "probability of every head to read everything")
    page.heading("The same questions to both models")
    add_answers(page, arms, task)
    page.text("The tokens that each head reads, with all heads (left) and the learned ones (right):", "soft")
    page.frame(stages.folder / "reads.html", "reads of both models")


def exchanged(before: Allocation, after: Allocation) -> int:
    """Return the number of heads that read everything in the first allocation but not in the second."""
    pairs = zip(chain(*before.head_sources), chain(*after.head_sources), strict=True)
    return sum(first == "full" != second for first, second in pairs)


def add_answers(page: Page, arms: list[Arm], task: Facts) -> None:
    """Add the first questions with every arm's answer."""
    for number in range(min(SHOWN, len(arms[0].texts))):
        example = task.example("val", number)
        page.folded(f"Question {number + 1}: {example['prompt'].splitlines()[-1]}", example["prompt"])
        rows = [["right answer", example["answer"]]]
        rows += [[arm.name, f"{'✓' if arm.right[number] else '✗'} {arm.texts[number]}"] for arm in arms]
        page.table(["", "answer"], rows)


def learn_gates(stages: Stages, given: argparse.Namespace) -> None:
    """Learn from reward which heads of the small model's gate read the memory, and measure them."""
    model, path = stages.folder / "mag_model", stages.folder / "gates.json"
    settings = {"source": "none", "prefill": "allocated", "initial": 0.5, "budget": BUDGET}
    settings |= {"attention_window": None, "num_sink_tokens": None}  # those of the configuration are SmolLM2's
    options = {
        "trainer.max_steps": given.rollouts,
        "trainer.callbacks": [CHECKPOINTS],
        "model.init_args.model": str(model),
        "model.init_args.dtype": "float32",
        "model.init_args.num_generations": 8,
        "model.init_args.max_completion_length": NextBytes().length,
        "model.init_args.objectives": [{"class_path": "hybridmem.rl.AllocationRL", "init_args": settings}],
        "data.init_args.tokenizer": str(model),
        "data.init_args.chat_template": False,
        "data.init_args.batch_size": 8,
        "data.init_args.task": {"class_path": "quickstart_gates.NextBytes"},
    }
    title, folder = "learning from reward which heads read the memory", stages.folder / "gates"
    stages.fit(title, given.reward_config, folder, options)
    if not path.exists():
        learned = gate_logits(stages).flatten()
        opened = learned.argsort(descending=True, stable=True)[: round(BUDGET * learned.numel())]
        with stages.timed("continuing held-out source"):
            measure_gates(model, opened.tolist(), SMALLER * given.prompts, path)


def gate_logits(stages: Stages) -> Tensor:
    """Return the learned logits of the gate's heads."""
    return load_checkpoint(stages.folder / "gates" / "last.ckpt")["state_dict"]["learned.Allocation.logits"]


def add_gates(stages: Stages, page: Page, problem: str, given: argparse.Namespace) -> None:
    """Add the comparison of the gate's heads and their map, in place of the pretrained model's."""
    arms, model = read_gate_arms(stages.folder / "gates.json"), stages.folder / "mag_model"
    task = NextBytes()
    prompts, said = SMALLER * given.prompts, gate_sentence(arms)
    stages.console.print(f"{said} ({prompts} held-out prompts)", soft_wrap=True)
    page.heading("Heads of the model just trained that need the memory")
    page.text(f"{said[0].upper()}{said[1:]}; {cache_sentence(model)}.", "answer")
    page.text(
        f"SmolLM2 is missing ({problem}); run scripts/quickstart again to add its heads. The small model answers no "
        f"questions, so the reward is a dense one: the share of the next {task.length} characters of source that it "
        f"writes before the first wrong one, after {task.context} characters. {given.rollouts} rollouts chose the "
        "heads, and the model itself stayed frozen. A head that is not chosen reads the window alone. "
        f"{prompts} prompts of held-out files were continued under each choice; the score of random heads is the mean "
        f"over {DRAWS} draws.",
        "soft",
    )
    draw_allocation(gate_logits(stages).sigmoid()).savefig(stages.folder / "gates.png")
    page.image(stages.folder / "gates.png", "probability of every head of the gate to read the memory")
    for number, example in enumerate(task.example("val", number) for number in range(SHOWN)):
        page.folded(f"Text {number + 1}: {example['answer']!r} comes next", example["prompt"])
        page.table(["", "written"], [[arm.name, repr(arm.texts[number])] for arm in arms])


def add_reads(stages: Stages, page: Page) -> None:
    """Add continuations and reads of the two small models, in place of the pretrained model."""
    page.heading("The same prompt to both models")
    prompt = stages.folder / "prompt.txt"
    prompt.write_text("class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.")
    text = prompt.read_text()
    page.table(["model", "continuation"], [[NAMES[name], sample(stages, name, text, 64, 0.0)] for name in NAMES])
    models = [stages.folder / f"{name}_model" for name in NAMES]
    record_reads(stages, models[0], models[1], prompt, "small_reads.html")
    page.frame(stages.folder / "small_reads.html", "reads of both models")


def add_machine(stages: Stages, page: Page) -> None:
    """Add the machine and the seconds of every stage."""
    found = environment()
    page.heading("Machine and time")
    page.text(f"{found['processor']}, {found['cores']} cores, Python {found['python']}", "soft")
    rows = [[title, *(f"{value:.0f}" for value in values)] for title, values in stages.seconds.items()]
    page.table(["stage", "seconds", "seconds of processors"], rows)
