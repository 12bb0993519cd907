"""Model card of an exported folder: training data, duration, metrics and usage."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from torch import Tensor
from transformers import PreTrainedConfig

from hybridmem.model.configuration import HybridMemConfig

DATA_SETTINGS = (
    "path",
    "dataset",
    "name",
    "revision",
    "split",
    "data_files",
    "text_column",
    "pattern",
    "mode",
    "sequence_length",
    "num_train",
    "max_bytes",
    "tokenizer",
    "processor",
)

FOLDER = "path/to/this/folder"
USE = """\
```bash
pip install hybridmem
```

```python
import hybridmem  # registers the model; without it, pass trust_remote_code=True to use the code in this folder
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""
USE_ELSEWHERE = """\
```python
from transformers import AutoConfig

config = AutoConfig.from_pretrained("path/to/this/folder")  # a standard transformers model; hybridmem is not needed
```
"""


def training_facts(
    data: L.LightningDataModule | None, metrics: Mapping[str, Tensor | float], method: str
) -> dict[str, Any]:
    """Return a model card's facts for a checkpoint, as plain values: data, method and the last logged metrics.

    Paths are reduced to their last part, because the rest may reveal a machine and its user.
    """
    settings = {} if data is None else dict(data.hparams)
    task = getattr(data, "task", None)
    described = {} if data is None else {"data": type(data).__name__ if task is None else type(task).__name__}
    described |= {name: public(settings[name]) for name in DATA_SETTINGS if settings.get(name) is not None}
    shown = {n: v for n, v in metrics.items() if n.startswith("val/") or n == "train/loss"}
    return {"data": described, "method": method, "metrics": {name: float(value) for name, value in shown.items()}}


def public(value: Any) -> Any:
    """Return a setting with local paths reduced to their last part; names on the hub stay unchanged."""
    if isinstance(value, (list, tuple)):
        return [public(part) for part in value]
    if isinstance(value, str) and (Path(value).expanduser().is_absolute() or Path(value).exists()):
        return Path(value).name
    return value


def model_card(
    config: PreTrainedConfig, checkpoint: dict[str, Any], license: str | None = None, name: str | None = None
) -> str:
    """Return the text of the model card.

    Args:
        config: model configuration.
        checkpoint: checkpoint of `hybridmem fit`; checkpoints without facts yield a shorter card.
        license: licence of the weights, a hub identifier such as apache-2.0.
        name: name of the model on the hub. None: the examples load a folder.
    """
    ours = isinstance(config, HybridMemConfig)
    tags = ["hybridmem", *(sorted(set(config.layer_types or ())) if isinstance(config, HybridMemConfig) else ())]
    header = {"library_name": "transformers", "tags": tags}
    header |= {"pipeline_tag": "text-generation"} if ours else {}
    header |= {"license": license} if license else {}
    facts = checkpoint.get("facts", {})
    trained = {"method": facts.get("method"), "optimiser steps": checkpoint.get("global_step")}
    sections = {
        "Use": (USE if ours else USE_ELSEWHERE).replace(FOLDER, name or FOLDER),
        "Model": _table(_architecture(config)),
        "Data": _table(facts.get("data", {})) or "The checkpoint does not record its training data.\n",
        "Training": _table({**trained, "hybridmem": version("hybridmem")}),
        "Metrics": _metrics(facts.get("metrics", {})),
        "Licence": f"{license}\n"
        if license
        else "The licence of the weights is not stated. hybridmem's code is Apache-2.0.\n",
    }
    title = f"{', '.join(tags[1:])} language model" if ours else f"{config.model_type} trained with hybridmem"
    body = "\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {title}\n\n{body}"


def _architecture(config: PreTrainedConfig) -> dict[str, Any]:
    names: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "vocab_size")
    if isinstance(config, HybridMemConfig):
        names += (
            "layer_types",
            "attention_window",
            "segment_length",
            "memory_depth",
            "memory_heads",
            "memory_head_dim",
        )
    return {"model_type": config.model_type} | {name: getattr(config, name, None) for name in names}


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return "No metrics were logged.\n"
    return "The last values logged before the checkpoint was written; validation may be some steps older.\n\n" + _table(
        {n: f"{v:.4g}" for n, v in metrics.items()}
    )


def _table(rows: dict[str, Any]) -> str:
    lines = []
    for name, value in rows.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"| {name} | {text.replace('|', chr(92) + '|')} |\n")
    return "| | |\n|---|---|\n" + "".join(lines) if lines else ""
