"""Trains the tokenizer of configs/rl/query.yaml: pieces of words of the standard library's docstrings, in lower case.

    python scripts/train_tokenizer.py --output configs/tokenizers/docstrings

Bytes that no piece holds stand for themselves, so any text can be written.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridmem.data.tokenizer import BOS, EOS, PAD
from hybridmem.tasks import Query

EXAMPLES = 40_000


def main() -> None:
    """Learn from training examples alone; what is held out stays unseen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()

    task = Query(every_line=True)
    examples = (task.example("train", index) for index in range(EXAMPLES))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS]
    trainer = trainers.BpeTrainer(vocab_size=options.vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((example["prompt"] + example["answer"] for example in examples), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )
    whole.save_pretrained(options.output)
    print(f"wrote {options.output}: {len(whole):,} tokens")


if __name__ == "__main__":
    main()
