"""`hybridmem eval`: a model on tasks at several lengths, as a table, a heat map and JSON."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from hybridmem.checks import at_least
from hybridmem.convert.weights import available_memory
from hybridmem.data.tokenizer import vocabulary_size
from hybridmem.evaluate.cells import ANY_LENGTH, LOSS, Cells
from hybridmem.evaluate.figures import draw_heat_map, name_of_length
from hybridmem.evaluate.harness import has_length
from hybridmem.evaluate.probes import Probe, Probes, expand
from hybridmem.evaluate.reader import Reader
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.training.checkpoints.contents import load_policy, tokenizer_of_policy
from hybridmem.training.run_lock import RUN_LOCK, LockedError, hold

LENGTH = re.compile(r"(\d+)([km]?)")
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
LONGEST = 1 << 21
ROOM = 2.0  # times the cache's size that has to be free: concatenation copies keys and values
HEAT_MAP = "heat_map.png"


def evaluate(
    model: str,
    tasks: str = "ruler,needle,loss_by_position,facts",
    lengths: str = "1k,4k,16k",
    output: Path = Path("runs/eval"),
    num_samples: int = 20,
    seed: int = 0,
    chunk_size: int = 1024,
    max_new_tokens: int = 128,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    path: str | None = None,
    pattern: str = "*.py",
) -> None:
    """Evaluate a model on long contexts; the same command resumes.

    Args:
        model: Hugging Face folder or name of a causal LM, or a checkpoint of `hybridmem fit`.
        tasks: task names separated by commas: ruler or ruler/SUBTASK, needle, loss_by_position, facts, lm_eval/NAME.
        lengths: prompt lengths in tokens, separated by commas; 1k is 1,024 and 1m is 1,048,576.
        output: folder of results.json and heat_map.png.
        num_samples: number of prompts for each task and length.
        seed: seed of the prompts.
        chunk_size: number of tokens that each forward pass reads.
        max_new_tokens: maximum number of tokens in an answer.
        dtype: dtype of the weights; auto keeps the stored one.
        device: device such as cpu or cuda; auto chooses cuda if available.
        path: folder of text for the prompts. None: the standard library of the running Python.
        pattern: pattern of the files to read in that folder.
    """
    at_least(1, num_samples=num_samples, chunk_size=chunk_size, max_new_tokens=max_new_tokens)
    at_least(0, seed=seed)
    rows, sizes = expand(split(tasks, "tasks")), parse_lengths(lengths)
    settings = dict(
        model=model,
        num_samples=num_samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        path=path,
        pattern=pattern,
    )
    output.mkdir(parents=True, exist_ok=True)
    try:
        with hold(output / RUN_LOCK):
            cells = Cells(output, settings)
            reader = load_reader(model, dtype, device, chunk_size, sizes[-1] + max_new_tokens)
            probes = Probes(reader, model, num_samples, max_new_tokens, seed, path, pattern)
            planned = [(row, size) for size in sizes for row in rows if has_length(row)]
            planned += [(row, ANY_LENGTH) for row in rows if not has_length(row)]
            waiting = [each for each in planned if cells.get(*each) is None]
            prepared = {each: probes.probe(*each) for each in waiting}
            measure(prepared, cells, reader.model.device)
    except LockedError as error:
        raise ValueError(f"output={output} is in use by another run ({error.holder}): choose another") from error
    columns = list(dict.fromkeys(size for _, size in planned))
    console = Console()
    console.print(table(cells, rows, columns))
    draw_heat_map(cells, rows, columns, Path(model).name or model, output / HEAT_MAP)
    console.print(f"wrote {cells.path} and {output / HEAT_MAP}", soft_wrap=True, highlight=False)


def measure(prepared: dict[tuple[str, int], Probe], cells: Cells, device: torch.device) -> None:
    """Measure cells one after another, with a line for each; skip those whose cache would not fit into memory."""
    for (row, size), probe in prepared.items():
        name, needed, free = f"{row} at {name_of_length(size)}", ROOM * cells.needed_bytes(size), free_bytes(device)
        if needed > free:
            cells.add(
                row, size, {"skipped": f"needs {needed / 1e9:.1f} GB for the cache, {free / 1e9:.1f} GB are free"}
            )
            print(f"{name}: skipped, {cells.cells[f'{row}@{size}']['skipped']}", flush=True)
            continue
        cells.add(row, size, probe())
        cell = cells.get(row, size)
        assert cell is not None
        state = f", state {in_bytes(cell['state_bytes'])}" if "state_bytes" in cell else ""
        print(f"{name}: {score(row, cell)}, {cell['seconds']:.2f} s{state}", flush=True)


def load_reader(name: str, dtype: str, device: str, chunk_size: int, longest: int) -> Reader:
    """Load a model and its tokenizer.

    Raises:
        ValueError: the tokenizer is missing or another model's, or the context is shorter than `longest`.
    """
    place = parse_device(device)
    tokenizer = tokenizer_of_model(name)
    model = load_model(name, tokenizer)
    check_context(name, model.config, longest)
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    model = model.to(place)
    ends = model.generation_config.eos_token_id if model.can_generate() else tokenizer.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return Reader(model, tokenizer, chunk_size, ends if isinstance(ends, list) else [] if ends is None else [ends])


def tokenizer_of_model(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ValueError: the model has no tokenizer.
    """
    tokenizer = tokenizer_of_policy(name)
    if tokenizer is None:
        raise ValueError(f"model={name} has no tokenizer: save its tokenizer to the folder")
    return tokenizer


def load_model(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load a model in evaluation mode.

    Raises:
        ValueError: the tokenizer belongs to another model.
    """
    with without_progress_bars():
        model = load_policy(name).eval()
    size, rows = vocabulary_size(tokenizer), model.config.get_text_config().vocab_size
    if size > rows:
        raise ValueError(
            f"model={name}: the tokenizer's largest id is {size - 1} but the model's vocab_size is {rows}: put the "
            "model's tokenizer there"
        )
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Context in which transformers shows no progress bar while loading."""
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()


def check_context(name: str, config: Any, longest: int) -> None:
    """Raise a ValueError for lengths beyond the learned positions of a model."""
    limit = learned_positions(config)
    if limit is not None and longest > limit:
        raise ValueError(
            f"model={name} has {limit} positions: lengths with max_new_tokens need {longest}; lower lengths"
        )


def learned_positions(config: Any) -> int | None:
    """Return the number of learned positions of a model, or None for rotary positions."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or isinstance(config, HybridMemConfig)
    return None if rotary else getattr(text, "max_position_embeddings", None)


def parse_device(device: str) -> torch.device:
    """Return the torch device of a name; `auto` is a GPU if one is available.

    Raises:
        ValueError: the device does not exist or cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used ({str(error).splitlines()[0]}): take cpu or auto"
        ) from error
    return torch.device(device)


def split(names: str, setting: str) -> list[str]:
    """Split a setting at its commas.

    Raises:
        ValueError: the setting has no parts.
    """
    parts = [part.strip() for part in names.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{setting}={names!r} names nothing")
    return parts


def parse_lengths(lengths: str) -> list[int]:
    """Return lengths in tokens, sorted.

    Raises:
        ValueError: a length is not a number with an optional k or m, or is too long.
    """
    found = set()
    for part in split(lengths, "lengths"):
        match = LENGTH.fullmatch(part.lower())
        if match is None:
            raise ValueError(f"lengths={lengths!r}: {part!r} is not a length; write 4096, 4k or 1m")
        found.add(int(match[1]) * UNITS[match[2]])
    at_least(1, LONGEST, lengths=min(found))
    at_least(1, LONGEST, lengths=max(found))
    return sorted(found)


def table(cells: Cells, rows: list[str], lengths: list[int]) -> Table:
    """Return a table of scores, with the time and cache of reading a prompt."""
    made = Table("task", *(name_of_length(length) for length in lengths))
    for row in rows:
        found = [cells.get(row, length) for length in lengths]
        made.add_row(row, *("-" if cell is None else score(row, cell) for cell in found))
    for label, key, write in (("seconds", "seconds", "{:.2f}".format), ("state", "state_bytes", in_bytes)):
        found_at = [[cell for row in rows if (cell := cells.get(row, length)) and key in cell] for length in lengths]
        made.add_row(label, *(write(max(cell[key] for cell in found)) if found else "-" for found in found_at))
    return made


def free_bytes(device: torch.device) -> float:
    """Return the bytes available for a cache on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() or float("inf")


def score(row: str, cell: dict[str, Any]) -> str:
    """Return a score with its unit."""
    return f"{cell['score']:.3f} bits per byte" if row.endswith(LOSS) else f"{100 * cell['score']:.0f} %"


def in_bytes(count: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
