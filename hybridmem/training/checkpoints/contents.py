"""Models, tokenizers and optimiser states of checkpoints and Hugging Face folders."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from hybridmem.checks import refuse_adapter
from hybridmem.data.tokenizer import load_tokenizer
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.model.modeling import HybridMemForCausalLM

from .loading import load_checkpoint
from .sharded import is_sharded

IGNORED = {"transformers_version", "dtype", "architectures", "auto_map", "use_cache", "_name_or_path"}


def config_entry(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a checkpoint's entry for the configuration of its model."""
    return {"hybridmem_config" if isinstance(config, HybridMemConfig) else "transformers_config": config.to_dict()}


def check_same_model(config: PreTrainedConfig, checkpoint: dict[str, Any]) -> None:
    """Raise a ValueError if the checkpoint's model differs from `config`, naming the settings that differ."""
    saved = checkpoint.get("hybridmem_config", checkpoint.get("transformers_config"))
    if saved is None:
        raise ValueError("the checkpoint has no hybridmem_config; choose a ckpt_path that hybridmem fit wrote")
    now = config.to_dict()
    names = sorted(name for name in saved.keys() & now.keys() - IGNORED if saved[name] != now[name])
    if names:
        changes = ", ".join(f"{name}={saved[name]!r} (here {now[name]!r})" for name in names)
        raise ValueError(f"the checkpoint belongs to another model: {changes}; set model.init_args.config accordingly")


def name_optimizer_states(
    checkpoint: dict[str, Any], parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizers: list[Optimizer]
) -> None:
    """Key a checkpoint's optimiser states by parameter name, because sharded runs number parameters differently.

    Optimisers accept both forms. Sharded states already have names; states of combined optimisers stay unchanged.
    """
    name_of = {parameter: name for name, parameter in parameters}
    states = checkpoint.get("optimizer_states", [])
    for place, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
        if "state" not in state:
            continue
        names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
        states[place] = {"state": {names[n]: kept for n, kept in state["state"].items()}, "param_groups": groups}


@contextmanager
def holding(module: torch.nn.Module, weights: dict[str, Any], prefix: str) -> Iterator[None]:
    """Give a module's parameters their values in `weights`, if they are there, inside the context."""
    own = {name: parameter.data for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.data = weights.get(prefix + name, own[name]).to(own[name].device)
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = own[name]


def model_of_checkpoint(checkpoint: dict[str, Any]) -> Any:
    """Return a checkpoint's model, with averaged weights (EMA) if it has any, and with adapters merged.

    Memories of layers in which no head reads one are left out.
    """
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
    read = model.state_dict().keys()
    model.load_state_dict({name: w for name, w in weights.items() if name in read or ".mixer.memory." not in name})
    return model.merge_and_unload() if checkpoint.get("lora") else model


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the transformers auto class of a model that generates text, which may be a vision-language model."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def load_policy(name: str) -> Any:
    """Load a causal LM from a Hugging Face folder or name, or from a checkpoint of `hybridmem fit`.

    Raises:
        OSError, ValueError: there is no such model, or only a PEFT adapter.
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
    """Return the local folder of an adapter on the Hugging Face hub, or None without an adapter or a network."""
    with suppress(OSError, ValueError):
        found = find_adapter_config_file(name)
        return None if found is None else Path(found).parent
    return None


def start_from(model: PreTrainedModel, name: str) -> None:
    """Copy the weights of the model that `load_policy` loads.

    Raises:
        ValueError: the tensors differ; the message names the first difference.
    """
    own, given = model.state_dict(), load_policy(name).state_dict()
    for tensor in sorted(own.keys() | given.keys()):
        shapes = [list(weights[tensor].shape) if tensor in weights else "absent" for weights in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} is another model: {tensor} differs ({shapes[1]} there, {shapes[0]} here); set "
                "model.init_args.config to that model's configuration"
            )
    model.load_state_dict(given)


def tokenizer_of_policy(name: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model that `load_policy` loads, or None if it is not recorded."""
    if _is_checkpoint(name):
        tokenizer = load_checkpoint(name, weights=False).get("tokenizer")
        return None if tokenizer is None else load_tokenizer(tokenizer)
    if not get_tokenizer_config(name) and not (Path(name) / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(name)


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix == ".ckpt" or is_sharded(name)
