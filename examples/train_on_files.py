"""Train a memory model on your own files, save it as a Hugging Face folder, and sample from it.

    python examples/train_on_files.py --path my/texts --pattern "*.txt"

Without --path it reads the standard library's source, in two minutes on two cores.
"""

from functools import partial

import lightning as L
import torch

from hybridmem import HybridMemConfig
from hybridmem.cli.console import run_script
from hybridmem.cli.progress import StepBar
from hybridmem.data import TextDataModule
from hybridmem.training import PretrainModule, WarmupCosine


def main(
    path: str | None = None,
    pattern: str = "*.py",
    steps: int = 240,
    width: int = 128,
    row: int = 1024,
    output: str = "runs/examples/text",
):
    """Train, save and sample.

    Args:
        path: file or folder to read; the standard library's source if not given.
        pattern: names of the files to read in a folder.
        steps: optimiser steps.
        width: hidden size of the model, a multiple of 4.
        row: bytes in a training row.
        output: folder of the trained model.
    """
    L.seed_everything(0)
    config = HybridMemConfig(
        layer_types=["swa", "mag", "swa"],  # one memory between two windows
        num_hidden_layers=3,
        hidden_size=width,
        intermediate_size=3 * width,
        head_dim=width // 4,
        attention_window=64,
        attention_conv=True,
        memory_head_dim=width // 4,
        memory_chunk_size=32,
    )
    module = PretrainModule(
        config,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=partial(WarmupCosine, warmup_steps=max(1, steps // 6)),
    )
    data = TextDataModule(path, pattern=pattern, sequence_length=row, max_val_bytes=200_000)
    when = dict(max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    output_only = dict(logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[StepBar()])
    trainer = L.Trainer(**when, **output_only, accelerator="cpu", gradient_clip_val=1.0)
    trainer.fit(module, data)

    module.model.save_pretrained(output)
    data.tokenizer.save_pretrained(output)
    print(f"{trainer.callback_metrics['val/bits_per_byte']:.2f} bits per byte of held-out files; saved to {output}")
    prompt = data.tokenizer("def ", return_tensors="pt").input_ids
    answer = module.model.generate(prompt, max_new_tokens=100, do_sample=True, temperature=0.7)
    print(data.tokenizer.decode(answer[0]))


if __name__ == "__main__":
    run_script(main)
