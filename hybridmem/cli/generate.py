"""`hybridmem generate`: text generation with an exported model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from hybridmem.checks import refuse_adapter
from hybridmem.data.tokenizer import vocabulary_size


def generate(
    model: Path,
    prompt: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stream: bool = True,
) -> None:
    """Continue a prompt with an exported model.

    Args:
        model: folder written by `hybridmem export`.
        prompt: text to continue. An empty prompt starts a new document.
        max_new_tokens: maximum number of tokens to generate.
        temperature: sampling temperature; 0 selects the most likely token.
        top_p: total probability of the most likely tokens to sample from.
        seed: seed of the sampling.
        stream: print text as it is generated instead of at the end.
    """
    refuse_adapter(model)
    if not model.exists():
        raise FileNotFoundError(f"model={model} does not exist; give a folder written by hybridmem export")
    if model.is_file():
        command = f"hybridmem export --ckpt_path {model} --output FOLDER"
        raise ValueError(f"model={model} is a file; if it is a checkpoint, export it first: {command}")
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"model={model} has no config.json; give a folder written by hybridmem export")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, and top_p={top_p} in (0, 1]")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    if (size := vocabulary_size(tokenizer)) > network.config.vocab_size:
        raise ValueError(
            f"model={model}: the tokenizer's largest id is {size - 1}, but the model's vocab_size is "
            f"{network.config.vocab_size}; replace the folder's tokenizer with the one from training"
        )
    set_seed(seed)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([start + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]])
    if not ids.numel():
        raise ValueError("prompt is empty, and the tokenizer has no BOS token to start a document; give a prompt")
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else dict(do_sample=False)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    out = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )
    if not stream:
        print(tokenizer.decode(out[0], skip_special_tokens=True))
