"""What a checkpoint holds beside weights, and the folder that a checkpoint becomes."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim import Optimizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from hybridmem.checks import refuse_adapter
from hybridmem.data.tokenizer import load_tokenizer
from hybridmem.data.vision import load_processor
from hybridmem.distributed import rank_and_size
from hybridmem.model.attention import AttentionState
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.model.convolution import ConvolutionState
from hybridmem.model.heads import FullKeys, HeadsState, WindowKeys
from hybridmem.model.memory import HeadMemoryState, NeuralMemoryState
from hybridmem.model.mixers import BranchStates, OpenSegment, SegmentStates
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.sequence import LastDocument
from hybridmem.model.sinks import Places
from hybridmem.model.state import map_state
from hybridmem_kernels import MemoryMLPState, MemoryState

from .durable import DurableCheckpointIO, read_checkpoint
from .model_card import model_card
from .sharded import check_shards, is_sharded

# Checkpoints are loaded with weights_only: nothing but tensors, plain values and these tuples of tensors.
torch.serialization.add_safe_globals(
    [
        AttentionState,
        BranchStates,
        ConvolutionState,
        FullKeys,
        HeadMemoryState,
        HeadsState,
        LastDocument,
        MemoryMLPState,
        MemoryState,
        NeuralMemoryState,
        OpenSegment,
        Places,
        SegmentStates,
        WindowKeys,
    ]
)

IGNORED = {"transformers_version", "dtype", "architectures", "auto_map", "use_cache", "_name_or_path"}


def check_same_model(config: HybridMemConfig, checkpoint: dict[str, Any]) -> None:
    """Raise a ValueError that names the settings in which a checkpoint's model differs."""
    saved = checkpoint.get("hybridmem_config")
    if saved is None:
        raise ValueError("the checkpoint holds no hybridmem_config: it was not written by hybridmem")
    now = config.to_dict()
    names = sorted(name for name in saved.keys() & now.keys() - IGNORED if saved[name] != now[name])
    if names:
        changes = ", ".join(f"{name}={saved[name]!r} (here {now[name]!r})" for name in names)
        raise ValueError(f"the checkpoint is of another model: {changes}; set model.init_args.config accordingly")


SavedCache = list[tuple[Any, ...]] | None


def save_cache(cache: DynamicCache | None) -> SavedCache:
    """The carried states as plain values, on the CPU."""
    if cache is None:
        return None
    return [
        (*map_state(lambda x: x.cpu(), (layer.state, layer.last_document)), layer.seen_tokens) for layer in cache.layers
    ]


def own_cache(saved: list[SavedCache]) -> SavedCache:
    """This process's rows of the states that all processes of a run saved, of however many that were.

    Raises:
        ValueError: they were others, and their states do not have one shape, as those of mac.
    """
    rank, size = rank_and_size()
    if len(saved) == size:
        return saved[rank]
    own = []
    for layers in zip(*(layers or () for layers in saved), strict=True):
        *states, seen = zip(*layers, strict=True)
        try:
            merged = [map_state(lambda *parts: torch.stack(parts, 1).flatten(0, 1), *parts) for parts in states]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the checkpoint's carried states are of {len(saved)} processes and do not join: go on with as many"
            ) from error
        own.append((*map_state(lambda x: x[rank::size].clone(), tuple(merged)), seen[0]))
    return own or None


def restore_cache(saved: SavedCache, config: HybridMemConfig) -> DynamicCache | None:
    """Undo `save_cache`."""
    if saved is None:
        return None
    cache = DynamicCache(config=config)
    for layer, (state, last_document, seen_tokens) in zip(cache.layers, saved, strict=True):
        layer.state, layer.seen_tokens, layer.last_document = state, seen_tokens, last_document
        layer.is_initialized = state is not None
    return cache


def load_checkpoint(path: str | Path, weights: bool = True, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Read a Lightning checkpoint, a file or the folder that a sharded run writes, without running anything in it.

    Args:
        path: the checkpoint.
        weights: whether a folder's weights are gathered too, or only what describes them.
        rank, size: of the processes that read a folder, each of which compares a share of its files with their digests.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or not a checkpoint of hybridmem.
    """
    path = Path(path)
    refuse_adapter(path)
    if path.is_dir() and path.suffix != ".ckpt" and not is_sharded(path):
        raise ValueError(
            f"ckpt_path={path} is a folder without a checkpoint: give a .ckpt file, or the folder of a sharded one"
        )
    checkpoint = _read_shards(path, weights, rank, size) if is_sharded(path) else read_checkpoint(path, "cpu")
    if not isinstance(checkpoint, dict) or not checkpoint.keys() & {"hybridmem_config", "transformers_config"}:
        raise ValueError(f"ckpt_path={path} was not written by hybridmem")
    return checkpoint


def _read_shards(path: Path, weights: bool, rank: int, size: int) -> dict[str, Any]:
    check_shards(path, rank, size)
    checkpoint = read_checkpoint(path / "meta.pt", "cpu")
    if weights:
        with tempfile.TemporaryDirectory() as folder:
            gathered = Path(folder) / "weights.pt"
            try:
                dcp_to_torch_save(path, gathered)
            except Exception as error:
                raise ValueError(f"ckpt_path={path} cannot be read as a checkpoint: {error}") from error
            checkpoint |= read_checkpoint(gathered, "cpu")
    return checkpoint


def consolidate(ckpt_path: Path, output: Path) -> None:
    """Make one file of the folder that a sharded run writes, to go on from with any strategy and number of processes.

    Args:
        ckpt_path: the folder.
        output: the file to write, ending in .ckpt.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that is a file already.
    """
    if ckpt_path.is_file():
        raise ValueError(f"ckpt_path={ckpt_path} is one file already: any strategy can go on from it")
    checkpoint = load_checkpoint(ckpt_path)
    names = sorted(name for name in checkpoint if name.startswith("optimizer_") and name[10:].isdigit())
    checkpoint["optimizer_states"] = [checkpoint.pop(name) for name in names]
    DurableCheckpointIO().save_checkpoint(checkpoint, output)
    print(f"wrote {output}")


def name_optimizer_states(checkpoint: dict[str, Any], module: torch.nn.Module, optimizers: list[Optimizer]) -> None:
    """Let a checkpoint's optimiser states say parameters' names, not their numbers, which sharded runs count otherwise.

    Optimisers take either. Sharded states say names already, and those of several optimisers as one stay as they are.
    """
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    states = checkpoint.get("optimizer_states", [])
    for place, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
        if "state" not in state:
            continue
        names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
        states[place] = {"state": {names[n]: kept for n, kept in state["state"].items()}, "param_groups": groups}


def model_of_checkpoint(checkpoint: dict[str, Any]) -> Any:
    """The model that a checkpoint holds, with its averaged weights (EMA) where it has them, adapters merged in."""
    if "hybridmem_config" in checkpoint:
        kept = {k: v for k, v in checkpoint["hybridmem_config"].items() if k not in IGNORED}
        model: Any = HybridMemForCausalLM(HybridMemConfig(**kept))
    else:
        config = AutoConfig.for_model(**checkpoint["transformers_config"])
        model = auto_class(config).from_config(config)
    if checkpoint.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**checkpoint["lora"]))
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    model.load_state_dict(weights)
    return model.merge_and_unload() if checkpoint.get("lora") else model


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' class for a model that writes text: a vision-language model is no causal LM there."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def load_policy(name: str) -> Any:
    """Load a causal LM from a Hugging Face folder or name, or from a checkpoint of `hybridmem fit`.

    Raises:
        OSError, ValueError: there is none, or an adapter of PEFT alone.
    """
    if _is_checkpoint(name):
        return model_of_checkpoint(load_checkpoint(name))
    refuse_adapter(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        adapter = _adapter_of_the_hub(name)
        if adapter is not None:
            refuse_adapter(adapter, name)
        raise
    return auto_class(config).from_pretrained(name)


def _adapter_of_the_hub(name: str) -> Path | None:
    """Return the local folder of an adapter on the Hugging Face hub, or None where there is none, or no network."""
    with suppress(OSError, ValueError):
        found = find_adapter_config_file(name)
        return None if found is None else Path(found).parent
    return None


def start_from(model: HybridMemForCausalLM, name: str) -> None:
    """Give a model the weights of what `load_policy` loads.

    Raises:
        ValueError: its tensors are others; the message names the first.
    """
    own, given = model.state_dict(), load_policy(name).state_dict()
    for tensor in sorted(own.keys() | given.keys()):
        shapes = [list(weights[tensor].shape) if tensor in weights else "absent" for weights in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} is another model: {tensor} is {shapes[1]} there and {shapes[0]} here; give config what that "
                "model's has"
            )
    model.load_state_dict(given)


def tokenizer_of_policy(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that `load_policy` loads; None where nothing says which it is."""
    if _is_checkpoint(name):
        tokenizer = load_checkpoint(name, weights=False).get("tokenizer")
        return None if tokenizer is None else load_tokenizer(tokenizer)
    if not get_tokenizer_config(name) and not (Path(name) / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(name)


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix == ".ckpt" or is_sharded(name)


def export(ckpt_path: Path, output: Path, license: str | None = None) -> None:
    """Write a checkpoint's model as a Hugging Face folder: safetensors, configuration, tokenizer, model code, card.

    Args:
        ckpt_path: a checkpoint of `hybridmem fit`. Averaged weights (EMA) are taken where it holds them.
        output: the folder to write.
        license: of the weights, for the model card: an identifier of the hub, such as apache-2.0.
    """
    output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is found before the work
    checkpoint = load_checkpoint(ckpt_path)
    tokenizer = load_tokenizer(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    model = model_of_checkpoint(checkpoint)
    if tokenizer is not None:
        ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        model.config.update(ends | dict(pad_token_id=tokenizer.pad_token_id))
        model.generation_config.update(**ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output)
    if checkpoint.get("processor"):
        load_processor(checkpoint["processor"]).save_pretrained(output)
    elif tokenizer is not None:
        tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(model.config, checkpoint, license))
    print(f"wrote {output}")
