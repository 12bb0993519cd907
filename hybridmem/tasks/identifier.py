"""Prediction of identifiers in real Python source whose last use lies beyond a window.

…  def _flush_unlocked(self): … (more than a window of other text) …  with self._write_lock:
        self.                                                           answer  _flush_unlocked
"""

import re
import sysconfig
from keyword import iskeyword
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from hybridmem.checks import at_least, between_0_and_1, number_held_out
from hybridmem.files import files_below

from .task import END_OF_ANSWER, Split, example_generator

# Words of source, in bytes. Non-ASCII bytes belong to words, so that no match is a part of a word.
WORD = re.compile(rb"(?<![0-9A-Za-z_\x80-\xff])[A-Za-z_\x80-\xff][0-9A-Za-z_\x80-\xff]*")
IDENTIFIER = re.compile(r"\w*")
# Comments and strings, matched from left to right, so that a quote in a comment starts no string.
NOT_CODE = re.compile(
    rb"\#[^\n]*"
    rb'|"""(?:[^\\]|\\.)*?"""'
    rb"|'''(?:[^\\]|\\.)*?'''"
    rb'|"(?:[^"\\\n]|\\.)*"'
    rb"|'(?:[^'\\\n]|\\.)*'",
    re.DOTALL,
)


class Identifier:
    """Python source, cut right before an identifier of its code; the answer is that identifier.

    The identifier's last occurrence, in code or elsewhere, lies in the prompt and ends at least `window` bytes before
    the cut. Keywords are never asked. A completion's answer ends at its first character that cannot be part of an
    identifier; later characters are ignored.

    Whole files are held out. They are the files that TextDataModule holds out of the same folder if its `val_fraction`
    and `split_seed` equal this task's `val_fraction` and `seed`. A file is read on first use; files that are not UTF-8
    have no examples.

    The column `distance` is the number of whole windows between the last occurrence's end and the cut.

    Args:
        window: the number of bytes before the cut without the identifier.
        context_length: the number of bytes in a prompt; fewer at the start of a file.
        min_length, max_length: bounds on the identifier's length in bytes.
        path: a folder of .py files; None reads the standard library of the running Python (about 30 MB).
        val_fraction: the fraction of files to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: The settings leave no examples. Contradictory settings raise at construction, unsuitable files at
            the first example.
    """

    def __init__(
        self,
        window: int = 256,
        context_length: int = 1024,
        min_length: int = 6,
        max_length: int = 32,
        path: str | None = None,
        val_fraction: float = 0.05,
        seed: int = 0,
    ):
        at_least(1, window=window, min_length=min_length, max_length=max_length)
        at_least(0, seed=seed)
        if context_length < window + min_length:
            raise ValueError(
                f"context_length={context_length} must be at least window + min_length = {window + min_length}, so "
                "that the prompt contains the identifier before the window"
            )
        if max_length < min_length:
            raise ValueError(f"max_length={max_length} must be at least min_length={min_length}")
        between_0_and_1(val_fraction=val_fraction)
        self.window, self.context_length = window, context_length
        self.min_length, self.max_length = min_length, max_length
        self.path, self.val_fraction, self.seed = path, val_fraction, seed
        self.files = split_files(source_files(path), val_fraction, seed)
        self.places: dict[Path, Int32[np.ndarray, "places 3"]] = {}

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "distance" in whole windows}; all files with examples are equally likely."""
        rng = example_generator(self.seed, split, index)
        for number in rng.permutation(len(self.files[split])):
            file = self.files[split][number]
            places = self.places_in(file)
            if len(places):
                last_end, start, stop = rng.choice(places).tolist()
                source = file.read_bytes()
                # The prompt may start inside a multi-byte character, whose remaining bytes are dropped.
                prompt = source[max(0, start - self.context_length) : start].decode(errors="ignore")
                return {
                    "prompt": prompt,
                    "answer": source[start:stop].decode(),
                    "distance": (start - last_end) // self.window,
                }
        raise ValueError(
            f"no {split} file has an identifier of {self.min_length} to {self.max_length} bytes whose last use lies "
            f"more than window={self.window} bytes back and within context_length={self.context_length}; lower window "
            "or min_length, raise context_length, or set path to more files"
        )

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for completions whose leading identifier is the answer, and 0 for others."""
        return [float(right) for right in self.is_right(completions, answer)]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Return True for completions whose leading identifier is the answer."""
        return [_leading(text) == right for text, right in zip(completions, answers, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest identifier, EOS included, with one token per byte."""
        return self.max_length + END_OF_ANSWER

    def places_in(self, file: Path) -> Int32[np.ndarray, "places 3"]:
        """Return a file's possible cuts as (last occurrence's end, identifier's start, identifier's end) in bytes."""
        if file not in self.places:
            found = [
                (last_end, start, stop)
                for last_start, last_end, start, stop in repeated_words(file.read_bytes())
                if self.min_length <= stop - start <= self.max_length
                and start - last_end >= self.window
                and start - last_start <= self.context_length
            ]
            self.places[file] = np.array(found, dtype=np.int32).reshape(-1, 3)
        return self.places[file]


def repeated_words(source: bytes) -> list[tuple[int, int, int, int]]:
    """Return the start and end of each repeated identifier's last occurrence, and its own start and end.

    The identifier is in code; its last occurrence may be in a comment or a string. Source that is not UTF-8 gives an
    empty list.
    """
    try:
        source.decode()
    except UnicodeDecodeError:
        return []
    in_code = np.ones(len(source), dtype=bool)
    for match in NOT_CODE.finditer(source):
        in_code[match.start() : match.end()] = False
    last: dict[bytes, tuple[int, int]] = {}
    found = []
    for match in WORD.finditer(source):
        word, (start, stop) = match[0], match.span()
        if word in last and in_code[start] and word.isascii() and not iskeyword(word.decode()):
            found.append((*last[word], start, stop))
        last[word] = start, stop
    return found


def source_files(path: str | None) -> list[Path]:
    """Return the distinct non-empty .py files of a folder, sorted, without hidden and installed files."""
    folder = Path(sysconfig.get_path("stdlib") if path is None else path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path={path!r} is not a folder; set it to a folder of .py files")
    unique: dict[Path, Path] = {}
    for file in files_below(folder):
        if file.suffix == ".py":
            unique.setdefault(file.resolve(), file)
    return [file for file in unique.values() if file.stat().st_size]


def split_files(files: list[Path], val_fraction: float, seed: int) -> dict[Split, list[Path]]:
    """Split files at random into training files and a fraction of validation files."""
    held_out = number_held_out(val_fraction, len(files), "files", "give more files")
    chosen = set(np.random.default_rng((seed,)).permutation(len(files))[:held_out].tolist())
    return {
        "train": [file for number, file in enumerate(files) if number not in chosen],
        "val": [file for number, file in enumerate(files) if number in chosen],
    }


def _leading(text: str) -> str:
    match = IDENTIFIER.match(text)
    assert match is not None  # it can be empty
    return match[0]
