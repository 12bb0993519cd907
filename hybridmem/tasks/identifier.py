"""Identifiers in real Python source, of which the last use lies further back than a window.

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

# Words of source, in bytes. What is not ASCII counts as part of a word, so that no half of a word is one.
WORD = re.compile(rb"(?<![0-9A-Za-z_\x80-\xff])[A-Za-z_\x80-\xff][0-9A-Za-z_\x80-\xff]*")
IDENTIFIER = re.compile(r"\w*")
# Comments and strings: found from left to right, so that a quote in a comment begins no string.
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

    All of the identifier's last occurrence, wherever in the text, lies more than `window` bytes before the cut and
    within the prompt. Keywords are never asked for. The completion's answer ends at its first character that no
    identifier has; what comes after counts for nothing.

    Whole files are held out: the very ones that TextDataModule holds out of the same folder when its `val_fraction`
    and its `split_seed` are this task's `val_fraction` and `seed`. A file is read when an example first needs it;
    one that is not UTF-8 has no examples.

    The column `distance` is the number of whole windows between the last occurrence's end and the cut.

    Args:
        window: bytes before the cut that the identifier is not in.
        context_length: bytes of a prompt; fewer where the file begins within it.
        min_length, max_length: of the identifier, in bytes.
        path: a folder of .py files; without one, the standard library of the running Python (about 30 MB).
        val_fraction: share of the files to hold out.
        seed: of the split and of all examples.

    Raises:
        ValueError: settings that leave no examples; an impossible combination is found at once, files without
            examples at the first one.
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
                f"context_length={context_length} must be at least window + min_length = {window + min_length}: the "
                "identifier stands in the prompt, before the window"
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
        """{"prompt", "answer", "distance" in whole windows}. Each file is as likely as any other that has one."""
        rng = example_generator(self.seed, split, index)
        for number in rng.permutation(len(self.files[split])):
            file = self.files[split][number]
            places = self.places_in(file)
            if len(places):
                last_end, start, stop = rng.choice(places).tolist()
                source = file.read_bytes()
                # The prompt can begin within a character of several bytes, of which the rest is left out.
                prompt = source[max(0, start - self.context_length) : start].decode(errors="ignore")
                return {
                    "prompt": prompt,
                    "answer": source[start:stop].decode(),
                    "distance": (start - last_end) // self.window,
                }
        raise ValueError(
            f"no {split} file has an identifier of {self.min_length} to {self.max_length} bytes whose last use lies "
            f"more than window={self.window} bytes back and within context_length={self.context_length}: lower window "
            "or min_length, raise context_length, or give more files"
        )

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """1 where the identifier that a completion begins with is the answer, else 0."""
        return [float(right) for right in self.is_right(completions, answer)]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Whether the identifier that a completion begins with is the answer."""
        return [_leading(text) == right for text, right in zip(completions, answers, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest identifier and its end, if each byte is a token."""
        return self.max_length + END_OF_ANSWER

    def places_in(self, file: Path) -> Int32[np.ndarray, "places 3"]:
        """Where a file can be cut: the last occurrence's end, the identifier's start and its end, in bytes."""
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
    """Each identifier of the code that occurred before: its last occurrence's start and end, its own start and end.

    The last occurrence can stand in a comment or a string. Source that is not UTF-8 has none.
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
    """The .py files of a folder that are not empty, each once and sorted, without hidden and installed ones."""
    folder = Path(sysconfig.get_path("stdlib") if path is None else path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path={path!r} is no folder")
    unique: dict[Path, Path] = {}
    for file in files_below(folder):
        if file.suffix == ".py":
            unique.setdefault(file.resolve(), file)
    return [file for file in unique.values() if file.stat().st_size]


def split_files(files: list[Path], val_fraction: float, seed: int) -> dict[Split, list[Path]]:
    """Files to train on, and a fraction of them, drawn by `seed`, to validate on."""
    held_out = number_held_out(val_fraction, len(files), f"{len(files)} files", ", or give more files")
    chosen = set(np.random.default_rng((seed,)).permutation(len(files))[:held_out].tolist())
    return {
        "train": [file for number, file in enumerate(files) if number not in chosen],
        "val": [file for number, file in enumerate(files) if number in chosen],
    }


def _leading(text: str) -> str:
    match = IDENTIFIER.match(text)
    assert match is not None  # it can be empty
    return match[0]
