"""Feeds broken settings and data files to `hybridmem fit`, and checks for one-line errors that name the cause.

    python scripts/fuzz.py --settings 2000 --files 500 --output docs/data/fuzz.json

Every case runs up to the first batch, in a fork of this process with limits on time and memory. Settings come from
configs/, with all defaults and tiny models, and with one or two values changed.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # broken model names must not be looked up online

import torch
import yaml
from lightning.pytorch.loops.fit_loop import _FitLoop

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.cli.main import main as hybridmem
from hybridmem.cli.parsing import settings_errors
from hybridmem.data import HubDataModule, TaskDataModule, TextDataModule
from hybridmem.data.tokenizer import byte_tokenizer
from hybridmem.tasks import ProductSearch
from hybridmem.training.errors import SettingsError

CONFIGS = Path(__file__).parents[1] / "configs"
SECONDS, ROOM = 60, 16 << 30  # CPU seconds, and bytes of address space
TINY = dict(
    hidden_size=64,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    attention_window=8,
    memory_heads=2,
    memory_head_dim=8,
    memory_chunk_size=8,
    num_persistent_tokens=2,
)
# Settings for which a wrong value is not an error, but a run elsewhere, on other machines or for longer.
LEFT_ALONE = {
    "num_sanity_val_steps",
    "default_root_dir",
    "num_nodes",
    "devices",
    "accelerator",
    "strategy",
    "logger",
    "profiler",
}
GENERIC = {"init_args", "class_path", "dict_kwargs", "trainer", "model", "data"}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 10**12, 10**30, 0.5, -0.5, 1e30, 1e-30, float("nan"), float("inf"),
    "", "text", "-1", "nan", "a: b", "/no/such/path", "é\x00", [], [1], ["a", None], {}, {"a": 1},
    {"class_path": "torch.nn.Linear"}, {"class_path": "no.such.Class", "init_args": {"a": 1}}, [[1, [2]]],
)  # fmt: skip

# Words for a value in its error message, by a part of the value's text.
CAUSES = {r"\x00": "null byte", "no.such.Class": "No module named 'no'"}

Keys = tuple[Any, ...]


class Case(NamedTuple):
    """Broken input, with words of which the error message must contain at least one."""

    what: str
    words: list[str]
    run: Callable[[], None]


class Accepted(BaseException):
    """A signal that the run would begin."""


def stop_before_the_first_batch(loop: _FitLoop) -> None:
    """Replace the training of an epoch by an exception."""
    raise Accepted


def complete(config: Path, folder: Path) -> dict[str, Any]:
    """Return a configuration with all defaults, a tiny model and small data."""
    options = {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto", "trainer.precision": 32}
    text = config.read_text()
    if "PretrainModule" in text:
        if "class_path: transformers." not in text:  # a baseline, which is small already
            options |= {f"model.init_args.config.{name}": value for name, value in TINY.items()}
            options |= {"model.init_args.config.vocab_size": 259}
            if "layer_types" not in text:
                options["model.init_args.config.num_hidden_layers"] = 2
    else:
        options |= {"model.init_args.model": folder / "policy"}
    if "TextDataModule" in text:
        options |= {"data.init_args.path": folder / "text", "data.init_args.pattern": "*.txt"}
    if "HubDataModule" in text:
        options |= {
            "data.init_args.dataset": "json",
            "data.init_args.name": "null",
            "data.init_args.num_workers": 0,
            "data.init_args.data_files": folder / "text.jsonl",
            "data.init_args.val_documents": 5,
        }
    if "TaskDataModule" not in text:
        options |= {"data.init_args.sequence_length": 32}
    if "ProductSearch" in text:
        options |= {
            "data.init_args.task.init_args.examples": folder / "examples.jsonl",
            "data.init_args.task.init_args.products": folder / "products.jsonl",
        }
    if "ProductSearch" in text or "AttentionMaps" in text:  # AttentionMaps answers before the first batch
        options |= {"model.init_args.max_completion_length": 16}
    options |= {"data.init_args.tokenizer": "bytes", "data.init_args.batch_size": 2}
    options |= {"trainer.default_root_dir": folder / "run"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    sys.argv = ["hybridmem", "fit", "--config", str(config), *arguments, "--print_config"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        hybridmem()
    return yaml.safe_load(printed.getvalue())


def write_data(folder: Path) -> None:
    """Write small texts, a policy and products."""
    (folder / "text").mkdir()
    for n in range(12):
        (folder / "text" / f"{n}.txt").write_text(f"value_{n} = {n * 7919} # line\n" * (20 + n))
    lines = [json.dumps({"text": f"line {n} of text, and more " * 9}) for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    products = [{"product_id": f"p{n}", "product_title": f"title of {n}"} for n in range(8)]
    examples = [
        {"query": f"query {n}", "product_id": f"p{n % 8}", "esci_label": "E", "split": "train" if n % 3 else "test"}
        for n in range(30)
    ]
    for name, rows in (("products", products), ("examples", examples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = HybridMemForCausalLM(HybridMemConfig(**TINY, vocab_size=259, num_hidden_layers=2))
    model.save_pretrained(folder / "policy")
    byte_tokenizer().save_pretrained(folder / "policy")


def places(tree: Any, path: Keys = ()) -> Iterator[Keys]:
    """Yield the path of every value in nested dictionaries and lists."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if key not in LEFT_ALONE:
            yield (*path, key)
            yield from places(value, (*path, key))


def at(tree: Any, path: Keys) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def mutate(config: dict[str, Any], numbers: random.Random) -> tuple[str, list[str]]:
    """Change one setting, and return a description with the words of which an error must contain one."""
    path = numbers.choice(list(places(config)))
    above, key = at(config, path[:-1]), path[-1]
    words = names(path)
    way = numbers.choice(["value", "value", "value", "missing", "unknown", "swapped", "negative", "text"])
    if way == "missing":
        del above[key]
    elif way == "unknown" and isinstance(above, dict):
        name = f"{key}_{numbers.choice('xyz')}"
        above[name] = above.pop(key)
        words.append(name)
    elif way == "swapped":
        other = numbers.choice([p for p in places(config) if p[: len(path)] != path and path[: len(p)] != p])
        there = at(config, other[:-1])
        above[key], there[other[-1]] = copy.deepcopy(there[other[-1]]), copy.deepcopy(above[key])
        words += names(other)
        return f"swapped {dotted(path)} with {dotted(other)}", words
    elif way == "negative" and isinstance(above[key], int | float):
        above[key] = -above[key] - 1
    elif way == "text" and isinstance(above[key], str):
        above[key] = numbers.choice([above[key] + "x", above[key].upper(), above[key][:-1], above[key][::-1]])
    else:
        above[key] = copy.deepcopy(numbers.choice(VALUES))
    value = repr(at(config, path)) if way != "missing" and way != "unknown" else ""
    if len(value) > 6:
        words.append(value.strip("'"))
    words += [cause for part, cause in CAUSES.items() if part in value]
    return f"{way} {dotted(path)} {value}"[:200], words


def names(path: Keys) -> list[str]:
    """Return the names by which an error may refer to a setting: its own and its parent's."""
    return [str(part) for part in path if isinstance(part, str) and part not in GENERIC][-2:] or [str(path[0])]


def dotted(path: Keys) -> str:
    """Return a path as a dotted command-line option."""
    return ".".join(map(str, path))


def settings_cases(count: int, folder: Path, numbers: random.Random, bases: dict[str, Any]) -> Iterator[Case]:
    """Yield broken configurations."""
    for number in range(count):
        name = numbers.choice(list(bases))
        config = copy.deepcopy(bases[name])
        done, words = zip(*(mutate(config, numbers) for _ in range(1 + number % 2)), strict=True)
        yield Case(f"{name}: {'; '.join(done)}", list(chain(*words)), partial(fit, config, folder))


def fit(config: dict[str, Any], folder: Path) -> None:
    """Run `hybridmem fit` up to the first batch."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    os.chdir(folder)  # runs without default_root_dir write to the working directory
    _FitLoop.advance = stop_before_the_first_batch
    sys.argv = ["hybridmem", "fit", "--config", str(path)]
    with contextlib.suppress(Accepted):
        hybridmem()


def read(kind: str, file: Path) -> None:
    """Read the first batches like `hybridmem fit`."""
    try:
        with settings_errors():
            data = module(kind, file)
            data.setup("fit")
            for loader in (data.train_dataloader(), data.val_dataloader()):
                next(iter(loader))
    except SettingsError as error:
        print(f"hybridmem: error: {error}", file=sys.stderr)
        sys.exit(2)


def broken_bytes(numbers: random.Random, lines: list[bytes]) -> bytes:
    """Return the lines of a file with one defect."""
    lines = list(lines)
    place = numbers.randrange(len(lines))
    line = lines[place]
    cut = numbers.randrange(1, len(line))
    wrong: list[bytes] = [
        b"", line[:cut], line[:cut] + b"\xff\xfe" + line[cut:], b"\x00" * 50, b"[" * 100_000, b'{"text": ' * 30_000,
        b'{"text": 1}', b'{"text": null}', b'{"other": "a"}', b"[1, 2]", b'"text"', b"NaN", b'{"text": "\\ud800"}',
        line + line, numbers.randbytes(300), b"\xef\xbb\xbf" + line, line.replace(b'"', b"'"), b"1" * 5000,
        b'{"text": ""}', b"{}", line.replace(b"}", b',"text": [1]}'), line.replace(b"E", b"Q"),
        line.replace(b"p", b"q"),
    ]  # fmt: skip
    lines[place] = numbers.choice(wrong)
    data = b"\n".join(lines)
    whole = numbers.randrange(8)
    if whole == 0:
        return data[: numbers.randrange(len(data))]
    if whole == 1:
        return data.replace(b"\n", b"\r\n")
    if whole == 2:
        return numbers.randbytes(len(data))
    return data


def file_cases(count: int, folder: Path, numbers: random.Random) -> Iterator[Case]:
    """Yield broken data files of every kind."""
    kinds = ("text", "json lines", "hub", "products", "examples")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        place = folder / "broken"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "text", place)
        for name in ("text.jsonl", "products.jsonl", "examples.jsonl"):
            shutil.copy(folder / name, place)
        name = {"text": "3.txt", "json lines": "text.jsonl", "hub": "text.jsonl"}.get(kind, f"{kind}.jsonl")
        file = place / name
        if numbers.randrange(12) == 0:
            odd(file, numbers)
        else:
            file.write_bytes(broken_bytes(numbers, file.read_bytes().splitlines()))
        yield Case(f"{kind} file {number}", [str(file), str(place)], partial(read, kind, file))


def odd(file: Path, numbers: random.Random) -> None:
    """Replace a file by nothing, a folder, a pipe, a link or an empty file."""
    file.unlink()
    numbers.choice(
        [
            lambda: None,
            file.mkdir,
            lambda: os.mkfifo(file),
            lambda: file.symlink_to(file),
            lambda: file.symlink_to("/dev/zero"),
            lambda: file.touch(),
        ]
    )()


def module(kind: str, file: Path) -> Any:
    """Return a data module that reads this kind of file."""
    small: dict[str, Any] = dict(sequence_length=32, batch_size=2)
    if kind == "text":
        tokenizer = str(file.parents[1] / "bpe")
        return TextDataModule(path=str(file.parent), pattern="*.txt", val_fraction=0.2, tokenizer=tokenizer, **small)
    if kind == "json lines":
        return TextDataModule(path=str(file), val_fraction=0.2, **small)
    if kind == "hub":
        return HubDataModule(dataset="json", data_files=str(file), val_documents=5, **small)
    task = ProductSearch(examples=str(file.parent / "examples.jsonl"), products=str(file.parent / "products.jsonl"))
    return TaskDataModule(task=task, batch_size=2, mode="prompts", num_val=4, num_train=8)


def outcome(case: Case) -> tuple[str, str]:
    """Run a case in its own process, and return the outcome and the last line of output."""
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if not process:
            in_a_child(case, said.fileno())
        _, status = os.waitpid(process, 0)
        said.seek(0)
        lines = [line for line in said.read().strip().splitlines() if line.strip()] or [""]
    code, last = os.waitstatus_to_exitcode(status), lines[-1]
    if code == 0:
        return "accepted", last
    if code < 0:
        return f"killed by {signal.Signals(-code).name}", last
    if code != 2 or not last.startswith("hybridmem: error: "):
        return "traceback", "\n".join(lines[-12:])
    named = any(word in last for word in case.words)
    return ("refused, naming the cause" if named else "refused without the cause"), last


def in_a_child(case: Case, output: int) -> None:
    """Run a case with limits, and exit."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # replaces streams that the caller may have redirected
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    signal.alarm(20 * SECONDS)  # stops cases that wait without using the CPU
    code = 0
    try:
        case.run()
    except SettingsError as error:
        print(f"hybridmem: error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 70
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def byte_level_bpe(folder: Path) -> None:
    """Write a tokenizer that requires UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["value line"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "bpe")


def sound(folder: Path) -> dict[str, Any]:
    """Return the complete configurations that are valid here; others need the hub or a GPU."""
    bases = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.name in ("compare", "overlays"):
            continue
        config = complete(path, folder)
        found, said = outcome(Case(path.name, [], partial(fit, config, folder)))
        if found == "accepted":
            bases[str(path.relative_to(CONFIGS))] = config
        else:
            print(f"skipped {path.relative_to(CONFIGS)}: {said[-300:]}")
    return bases


def main() -> None:
    """Run all cases, and exit with 1 if any was neither accepted nor rejected with its cause."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", type=int, default=2000, help="number of broken configurations")
    parser.add_argument("--files", type=int, default=500, help="number of broken data files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    command = " ".join(["python", *sys.argv])  # read now, because cases overwrite sys.argv
    torch.set_num_threads(1)
    begun, numbers = time.monotonic(), random.Random(options.seed)
    counts: dict[str, Counter[str]] = {"settings": Counter(), "files": Counter()}
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        byte_level_bpe(folder)
        bases = sound(folder) if options.settings else {}
        cases = {
            "settings": settings_cases(options.settings, folder, numbers, bases),
            "files": file_cases(options.files, folder, numbers),
        }
        figures = {"command": command, "configurations": sorted(bases), **counts}
        for kind, of_kind in cases.items():
            for number, case in enumerate(of_kind, 1):
                found, said = outcome(case)
                counts[kind][found] += 1
                if found not in ("accepted", "refused, naming the cause"):
                    failures += 1
                    print(f"{found}: {case.what}\n    {said}\n", flush=True)
                if number % 100 == 0:
                    print(f"{number} {kind}, {time.monotonic() - begun:.0f} seconds", flush=True)
                if options.output:  # an interrupted run keeps its results
                    options.output.write_text(json.dumps(figures, indent=1) + "\n")
                shutil.rmtree(folder / "run", ignore_errors=True)
    print(counts, f"{time.monotonic() - begun:.0f} seconds, {len(bases)} configurations", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
