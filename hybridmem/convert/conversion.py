"""Conversion of a pretrained causal LM, in memory or from folder to folder."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from hybridmem.model.configuration import HEAD_SOURCES, HybridMemConfig, check_head_sources
from hybridmem.model.memory import HeadMemory
from hybridmem.model.modeling import HybridMemForCausalLM

from .allocation import Allocation, kv_heads
from .family import refuse_unsupported, shared_settings
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .weights import (
    Weight,
    available_memory,
    check_weights,
    plan_shards,
    read_all,
    weights_of_folder,
    weights_of_model,
    write_shards,
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
CARRIED = [
    *("*token*.json", "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja", "chat_template*"),
    *("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
FETCHED = [*CARRIED, "config.json", "*.safetensors", "*.safetensors.index.json"]
ALLOCATION = "allocation.json"
MEMORY = re.compile(r"model\.layers\.(\d+)\.mixer\.memory\.")
SHARD_BYTES = 2 * 10**9
SPARE_BYTES = 64 * 2**20  # code, tokenizer and other small files

Sources = str | list[list[str]]


def convert(
    model: PreTrainedModel | str | Path,
    attention_window: int | None = None,
    num_sink_tokens: int | None = None,
    head_source: Sources | None = None,
    memory_depth: int | None = None,
    allocation: Allocation | str | Path | None = None,
) -> HybridMemForCausalLM:
    """Convert a pretrained model to a HybridMem model.

    Every layer becomes `mah`. With all heads `full`, the logits are identical to the pretrained model's.

    Args:
        model: a causal LM of transformers, or a Hugging Face folder or name. Weights of a given model are copied. With
            an allocation, the model may be converted already.
        attention_window: number of tokens visible to heads other than `full`. None: the allocation's, or else 256.
        num_sink_tokens: first tokens of a document that these heads see as well. None: the allocation's, or else 4.
        head_source: `full`, `memory` or `none` for all heads, or a list of these for each layer and KV head. Layers
            with a `memory` head get memories, whose gates are initially closed (see `HeadMemory`). None: full.
        memory_depth: number of layers of each new memory; 1, the default, is linear.
        allocation: the sources of all heads in place of head_source, or their file. The model must hold the memories
            that it names; memories that no head reads are left out.

    Raises:
        ValueError: the model type, a feature or a setting is not supported; the message names it.
        FileNotFoundError: the folder or name does not exist.
        MemoryError: the weights do not fit into memory.
    """
    with ExitStack() as files:
        if isinstance(model, PreTrainedModel):
            base, folder, found = deepcopy(model.config), None, weights_of_model(model)
            base.dtype = model.dtype
        else:
            folder = find_folder(model)
            base, found = _read_config(folder), weights_of_folder(folder, files)
        settings = (attention_window, num_sink_tokens, head_source, memory_depth)
        config, found = _plan(base, found, _settled(allocation, *settings), *settings)
        empty = _empty_model(config)
        weights = check_weights(found, empty, config.tie_word_embeddings)
        _check_memory(sum(weight.nbytes for weight in weights.values()))
        # A model may mix dtypes; a folder is loaded in the dtype of its configuration.
        tensors = dict(read_all(weights, None if folder is None else config.dtype))
    converted = empty
    converted.load_state_dict(tensors, strict=False, assign=True)
    converted.tie_weights()
    if isinstance(model, PreTrainedModel):
        converted.generation_config = model.generation_config
        converted.to(model.device)
    elif folder is not None and (folder / "generation_config.json").is_file():
        converted.generation_config = GenerationConfig.from_pretrained(folder)
    return converted.train(isinstance(model, PreTrainedModel) and model.training)


def convert_folder(
    model: str | Path,
    output: Path,
    attention_window: int | None = None,
    num_sink_tokens: int | None = None,
    head_source: Sources | None = None,
    memory_depth: int | None = None,
    allocation: Allocation | str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> HybridMemConfig:
    """Convert a Hugging Face folder or name to a folder, with one shard in memory at a time.

    Tokenizer, chat template, generation configuration and licence are copied, and the model's code is added, with an
    allocation as `allocation.json`.

    Args:
        model, attention_window, num_sink_tokens, head_source, memory_depth, allocation: as in `convert`.
        output: the folder to write; it appears only when complete.
        shard_bytes: maximum size of a file of weights.
        track: wrapper of the list of shards that shows progress.

    Returns:
        the configuration of the converted model.

    Raises:
        ValueError, FileNotFoundError, MemoryError: as in `convert`.
        OSError: the output folder is not writable or not empty, or the disk has too little space.
    """
    _check_output(output)
    settings = (attention_window, num_sink_tokens, head_source, memory_depth)
    allocation = _settled(allocation, *settings)
    source = find_folder(model)
    base = _read_config(source)
    with ExitStack() as files:
        config, found = _plan(base, weights_of_folder(source, files), allocation, *settings)
        empty = _empty_model(config)
        weights = check_weights(found, empty, config.tie_word_embeddings)
        shards = plan_shards(weights, shard_bytes)
        _check_memory(2 * max(sum(weights[name].nbytes for name in shard) for shard in shards))
        _check_disk(output, sum(weight.nbytes for weight in weights.values()))
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            folder = Path(temporary) / output.name
            folder.mkdir()
            for path in _carried(source):
                shutil.copyfile(path, folder / path.name)
            write_shards(weights, shards, folder, track)
            _write_configuration(empty, folder)
            (folder / "README.md").write_text(_card(str(model), config))
            if allocation is not None:
                allocation.save(folder / ALLOCATION)
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
    return config


def converted_config(
    base: PreTrainedConfig,
    attention_window: int | None = None,
    num_sink_tokens: int | None = None,
    head_source: Sources | None = None,
    memory_depth: int | None = None,
) -> HybridMemConfig:
    """Return the configuration of a converted model.

    Raises:
        ValueError: the model type, a feature or a setting is not supported.
    """
    attention_window = 256 if attention_window is None else attention_window
    num_sink_tokens = 4 if num_sink_tokens is None else num_sink_tokens
    head_source = "full" if head_source is None else head_source
    memory_depth = 1 if memory_depth is None else memory_depth
    if base.model_type == HybridMemConfig.model_type:
        raise ValueError("the model is converted already: give an allocation, or the model that it was converted from")
    family = FAMILIES.get(base.model_type)
    if family is None:
        raise ValueError(f"model_type={base.model_type!r} is not supported: choose a model of {', '.join(FAMILIES)}")
    refuse_unsupported(base)
    settings = shared_settings(base) | family.settings(base)
    _check_settings(settings, attention_window, num_sink_tokens)
    layers, heads = settings["num_hidden_layers"], settings["num_key_value_heads"]
    if isinstance(head_source, str):
        if head_source not in HEAD_SOURCES:
            raise ValueError(f"head_source={head_source!r} is unknown: choose one of {', '.join(HEAD_SOURCES)}")
        head_source = [[head_source] * heads for _ in range(layers)]
    if memory_depth < 1:
        raise ValueError(f"memory_depth={memory_depth} must be at least 1")
    config = HybridMemConfig(
        **settings,
        variant="mah",
        attention_window=attention_window,
        num_sink_tokens=num_sink_tokens,
        num_persistent_tokens=0,
        memory_depth=memory_depth,
    )
    check_head_sources(head_source, config)
    config.head_sources = [list(row) for row in head_source]
    return config


def _settled(
    allocation: Allocation | str | Path | None,
    attention_window: int | None,
    num_sink_tokens: int | None,
    head_source: Sources | None,
    memory_depth: int | None,
) -> Allocation | None:
    """Return the allocation, read from its file, with the window that is set."""
    if allocation is None:
        return None
    for name, value in (("head_source", head_source), ("memory_depth", memory_depth)):
        if value is not None:
            raise ValueError(f"{name}={value!r} and an allocation exclude each other: leave one of them out")
    found = allocation if isinstance(allocation, Allocation) else Allocation.load(allocation)
    return replace(
        found,
        attention_window=found.attention_window if attention_window is None else attention_window,
        num_sink_tokens=found.num_sink_tokens if num_sink_tokens is None else num_sink_tokens,
    )


def _plan(
    base: PreTrainedConfig,
    found: dict[str, Weight],
    allocation: Allocation | None,
    attention_window: int | None,
    num_sink_tokens: int | None,
    head_source: Sources | None,
    memory_depth: int | None,
) -> tuple[HybridMemConfig, dict[str, Weight]]:
    """Return the configuration to convert to, and the weights with the memories that heads read."""
    if allocation is None:
        config = converted_config(base, attention_window, num_sink_tokens, head_source, memory_depth)
        return config, found | _new_memories(config)
    window, sinks = allocation.attention_window, allocation.num_sink_tokens
    config = deepcopy(base) if isinstance(base, HybridMemConfig) else converted_config(base, window, sinks)
    heads = kv_heads(config)
    memory_of = {name: int(match[1]) for name in found if (match := MEMORY.match(name)) and heads[int(match[1])]}
    allocation.check(config, set(memory_of.values()))
    shape = dict(max_position_embeddings=config.max_position_embeddings, sliding_windows=config.sliding_windows)
    _check_settings(shape, window, sinks)
    config.attention_window, config.num_sink_tokens = window, sinks
    config.head_sources = [list(row) for row in allocation.head_sources]
    unread = {name for name, layer in memory_of.items() if "memory" not in config.head_sources[layer]}
    return config, {name: weight for name, weight in found.items() if name not in unread}


def find_folder(model: str | Path) -> Path:
    """Return a Hugging Face folder, downloaded from the hub if necessary.

    Raises:
        FileNotFoundError: the model is neither a folder nor available from the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model={model} holds no config.json: name a Hugging Face folder")
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"model={model} is not a folder, and the hub has no such model or is unreachable: check the name, the "
            "network, or HF_TOKEN"
        ) from error


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder / 'config.json'} cannot be read as a model's configuration: {reason}") from error


def _check_settings(settings: dict[str, Any], window: int, sinks: int) -> None:
    context = settings["max_position_embeddings"]
    if window < 1:
        raise ValueError(f"attention_window={window} must be at least 1")
    if window > context:
        raise ValueError(
            f"attention_window={window} is longer than the model's context of {context} tokens: use at most {context}"
        )
    shortest = min((n for n in settings.get("sliding_windows") or () if n is not None), default=window)
    if window > shortest:
        raise ValueError(
            f"attention_window={window} is longer than the model's sliding window of {shortest} tokens: use at most "
            f"{shortest}"
        )
    if not 0 <= sinks <= context:
        raise ValueError(f"num_sink_tokens={sinks} must lie between 0 and the model's context of {context} tokens")


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output={output} is a file: name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output={output} is not empty: name another folder, or empty it")


def _check_memory(needed: int) -> None:
    free = available_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"{needed / 1e9:.1f} GB of memory are needed, but {free / 1e9:.1f} GB are free: close other programs, "
            "convert from folder to folder (hybridmem convert), or use a machine with more memory"
        )


def _check_disk(output: Path, needed: int) -> None:
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, needed + SPARE_BYTES
    if needed > free:
        raise OSError(
            f"output={output} needs {needed / 1e9:.1f} GB of disk, but {free / 1e9:.1f} GB are free: make room or name "
            "a folder on another disk"
        )


def _empty_model(config: HybridMemConfig) -> HybridMemForCausalLM:
    """Create a model on the meta device, with names and shapes only."""
    with torch.device("meta"):
        return HybridMemForCausalLM(config)


def _new_memories(config: HybridMemConfig) -> dict[str, Weight]:
    """Initialise memories for the layers with `memory` heads, with a separate seed."""
    assert config.head_sources is not None
    found = {}
    for layer, sources in enumerate(config.head_sources):
        if "memory" not in sources:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(layer)
            memory = HeadMemory(config)
            memory.initialize()
        for name, tensor in memory.to(config.dtype or torch.float32).state_dict().items():
            size = tensor.numel() * tensor.element_size()
            found[f"model.layers.{layer}.mixer.memory.{name}"] = Weight(tuple(tensor.shape), size, tensor.clone)
    return found


def _carried(source: Path) -> Iterator[Path]:
    """List the files other than weights that a converted model needs."""
    found = {path for pattern in CARRIED for path in source.glob(pattern) if path.is_file()}
    return iter(sorted(found))


def _write_configuration(model: HybridMemForCausalLM, folder: Path) -> None:
    """Write config.json and the code that it refers to."""
    config = model.config
    config.architectures = [type(model).__name__]
    model.set_auto_map()
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)


def _card(base: str, config: HybridMemConfig) -> str:
    """Return the folder's model card."""
    assert config.head_sources is not None
    sources = [source for row in config.head_sources for source in row]
    counts = ", ".join(f"{sources.count(source)} {source}" for source in HEAD_SOURCES if source in sources)
    name = "" if Path(base).is_dir() else f"base_model: {base}\n"
    origin = base if name else "a local folder"
    window, sinks = config.attention_window, config.num_sink_tokens
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{name}tags: [hybridmem]
---

# A model converted by hybridmem

Converted from {origin}. KV heads by source: {counts}. Heads other than `full` see the last {window} tokens and the
first {sinks}. The licence is the base model's.

```python
import hybridmem  # or trust_remote_code=True
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""
