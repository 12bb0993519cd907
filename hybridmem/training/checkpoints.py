"""What a checkpoint holds beside weights, and the folder that a checkpoint becomes."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
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

from hybridmem_kernels import MemoryMLPState, MemoryState

from ..attention import AttentionState
from ..configuration import HybridMemConfig
from ..convolution import ConvolutionState
from ..data import load_processor, load_tokenizer
from ..memory import NeuralMemoryState
from ..modeling import HybridMemForCausalLM
from ..sequence import LastDocument
from ..variants import BranchStates, OpenSegment, SegmentStates
from .model_card import model_card

# Checkpoints are loaded with weights_only: nothing but tensors, plain values and these tuples of tensors.
torch.serialization.add_safe_globals(
    [
        AttentionState,
        BranchStates,
        ConvolutionState,
        LastDocument,
        MemoryMLPState,
        MemoryState,
        NeuralMemoryState,
        OpenSegment,
        SegmentStates,
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


def save_cache(cache: DynamicCache | None) -> list[tuple[Any, ...]] | None:
    """The carried states as plain values."""
    if cache is None:
        return None
    return [(layer.state, layer.seen_tokens, layer.last_document) for layer in cache.layers]


def restore_cache(saved: list[tuple[Any, ...]] | None, config: HybridMemConfig) -> DynamicCache | None:
    """Undo `save_cache`."""
    if saved is None:
        return None
    cache = DynamicCache(config=config)
    for layer, (state, seen_tokens, last_document) in zip(cache.layers, saved, strict=True):
        layer.state, layer.seen_tokens, layer.last_document = state, seen_tokens, last_document
        layer.is_initialized = state is not None
    return cache


def load_checkpoint(path: str | Path, weights: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint, a file or the folder that a sharded run writes, without running anything in it.

    Args:
        path: the checkpoint.
        weights: whether a folder's weights are gathered too, or only what describes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of hybridmem.
    """
    path = Path(path)
    sharded = (path / "meta.pt").is_file()
    if not path.is_file() and not sharded:
        raise FileNotFoundError(f"ckpt_path={path} does not exist")
    try:
        checkpoint = _load(path / "meta.pt" if sharded else path)
        if sharded and weights:
            with tempfile.TemporaryDirectory() as folder:
                gathered = Path(folder) / "weights.pt"
                dcp_to_torch_save(path, gathered)
                checkpoint |= _load(gathered)
    except Exception as error:
        raise ValueError(f"ckpt_path={path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() & {"hybridmem_config", "transformers_config"}:
        raise ValueError(f"ckpt_path={path} was not written by hybridmem")
    return checkpoint


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


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
    """A causal LM from a Hugging Face folder or name, or from a checkpoint of `hybridmem fit`."""
    if _is_checkpoint(name):
        return model_of_checkpoint(load_checkpoint(name))
    return auto_class(AutoConfig.from_pretrained(name)).from_pretrained(name)


def tokenizer_of_policy(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that `load_policy` loads; None where nothing says which it is."""
    if _is_checkpoint(name):
        tokenizer = load_checkpoint(name, weights=False).get("tokenizer")
        return None if tokenizer is None else load_tokenizer(tokenizer)
    if not get_tokenizer_config(name) and not (Path(name) / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(name)


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix == ".ckpt" or (Path(name) / "meta.pt").is_file()


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
