"""`hybridmem show`: a page with the tokens that a model reads, by layer and head."""

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridmem.checks import at_least
from hybridmem.data.task_module import chat_tokens
from hybridmem.evaluate.observe import read
from hybridmem.evaluate.page import MOST_TOKENS, write_page
from hybridmem.evaluate.readings import Reading
from hybridmem.rl.attention.recorder import decoder_layers

from .eval import learned_positions, load_model, parse_device, split, tokenizer_of_model

MOST_LAYERS = 8  # without `layers`
MOST_READS = 64


def show(
    model: str,
    prompt: str,
    other: str | None = None,
    output: Path = Path("page.html"),
    max_new_tokens: int = 64,
    layers: str | None = None,
    top: int = 8,
    chat: bool = False,
    device: str = "auto",
) -> None:
    """Write a self-contained page with the tokens that attention and memory read, gates and surprise.

    Args:
        model: Hugging Face folder or name of a causal LM, or a checkpoint of `hybridmem fit`.
        prompt: text, or the path of a file with the text.
        other: second model to run on the prompt.
        output: HTML file to write.
        max_new_tokens: maximum length of each model's greedy continuation; 0 shows the prompt alone.
        layers: layer indices separated by commas, negative ones from the end, or all. None: up to 8, evenly spaced.
        top: number of strongest reads to keep for each token and head.
        chat: put the prompt into the tokenizer's chat template, as a user's message.
        device: device such as cpu or cuda; auto chooses cuda if available.
    """
    at_least(0, max_new_tokens=max_new_tokens)
    at_least(1, MOST_READS, top=top)
    title, text = read_prompt(prompt)
    if output.is_dir():
        raise ValueError(f"output={output} is a folder; name a file, such as {output / 'page.html'}")
    place = parse_device(device)
    readings = []
    names = [model] if other is None else [model, other]
    for name, label in zip(names, short_names(names), strict=True):
        tokenizer = tokenizer_of_model(name)
        ids = prompt_ids(name, tokenizer, text, chat)
        reading = read_with(name, tokenizer, ids, max_new_tokens, layers, top, place)
        readings.append((label, reading, tokenizer))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_page(readings, title, output)
    print(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")


def short_names(names: list[str]) -> list[str]:
    """Return the last components of the models' paths, or the whole paths if these are equal."""
    parts = [Path(name).name or name for name in names]
    return parts if len(set(parts)) == len(parts) else names


def read_prompt(prompt: str) -> tuple[str, str]:
    """Return a title with the text: a file's name and contents, or the prompt itself.

    Raises:
        ValueError: the text is empty, or the file is not UTF-8.
        FileNotFoundError: the prompt looks like a path, without white space, but there is no such file.
    """
    path = Path(prompt)
    if not os.path.isfile(prompt):  # unlike Path.is_file, accepts text of any length
        if (path.suffix or len(path.parts) > 1) and not any(map(str.isspace, prompt)):
            raise FileNotFoundError(f"prompt={prompt} is not a file; give a text file's path, or text with a space")
        if not prompt:
            raise ValueError("prompt is empty; write at least one character")
        return "prompt", prompt
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt={path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text:
        raise ValueError(f"prompt={path} is empty; write at least one character")
    return path.name, text


def prompt_ids(name: str, tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """Return a prompt's tokens: a user's message, or a document that begins with the BOS token if there is one.

    Raises:
        ValueError: the tokenizer has no chat template, or drops the whole text.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"chat=true: the tokenizer of {name} has no chat template; remove chat")
    if chat:
        return chat_tokens(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt has no token: the tokenizer of {name} drops all of {text[:20]!r}; give other text")
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def read_with(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    layers: str | None,
    top: int,
    device: torch.device,
) -> Reading:
    """Load a model, continue the prompt, and read both.

    Raises:
        ValueError: the text is too long, or the model or its layers cannot be recorded.
    """
    needed = len(ids) + max_new_tokens
    if needed > MOST_TOKENS:
        raise ValueError(f"prompt and max_new_tokens={max_new_tokens} need {needed} tokens; at most {MOST_TOKENS} fit")
    network = load_model(name, tokenizer).to(device)
    limit = learned_positions(network.config)
    if limit is not None and needed > limit:
        raise ValueError(
            f"model={name} has {limit} positions, but prompt and max_new_tokens={max_new_tokens} need {needed}; "
            "shorten the prompt or lower max_new_tokens"
        )
    numbers = parse_layers(layers, len(decoder_layers(network)))
    return read(network, continued(network, ids, max_new_tokens), len(ids), numbers, top)


def continued(model: Any, ids: list[int], max_new_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the prompt with its greedy continuation."""
    prompt = torch.tensor([ids], device=model.device)
    if not max_new_tokens:
        return prompt[0].cpu()
    ends = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    settings: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if pad is None and ends is not None:
        settings["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **settings)
    return out[0].cpu()


def parse_layers(layers: str | None, count: int) -> list[int]:
    """Return layer indices.

    Raises:
        ValueError: a part is not an index.
    """
    if layers is None:
        shown = min(count, MOST_LAYERS)
        return [round(n * (count - 1) / max(1, shown - 1)) for n in range(shown)]
    if layers == "all":
        return list(range(count))
    parts = split(layers, "layers")
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"layers={layers!r} must be all, or indices separated by commas such as 0,5,-1") from error
