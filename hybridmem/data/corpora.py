"""Finding documents, reading them, and keeping some of them apart."""

import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridmem.checks import number_held_out
from hybridmem.files import COMPRESSED, files_below, is_jsonl, lines_of, read_file, size_of

from .order import permutation


@dataclass(frozen=True)
class Document:
    """A file, or one text out of a file.

    Args:
        name: what errors call it.
        size: in bytes, decompressed.
        source: where the bytes are read when they are needed, or the bytes.
    """

    name: str
    size: int
    source: Path | bytes

    def read(self) -> bytes:
        """Return all of it, decompressed."""
        return self.source if isinstance(self.source, bytes) else read_file(self.source)


def standard_library_files() -> list[Path]:
    """Every .py file of the running interpreter's standard library, sorted: about 30 MB on any machine."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [file for file in files_below(folder) if file.suffix == ".py"]


def list_documents(
    paths: str | Path | Sequence[str | Path] | None,
    *,
    pattern: str = "*.py",
    text_column: str = "text",
    setting: str = "path",
) -> list[Document]:
    """The documents of files and folders, each once, without empty ones.

    A folder gives its files whose name matches `pattern`, hidden ones and those of __pycache__ and site-packages
    apart, however deep, through links too. A .jsonl file gives one document per line. Files that end in .gz, .bz2 or
    .xz are decompressed. Endings count in any case. None stands for the standard library. Errors call `paths` by the
    name of the `setting` that gave them.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder without a matching file, a bad line, a file that cannot be decompressed, or nothing but
            empty documents.
    """
    if paths is None:
        files = standard_library_files()
    else:
        paths = [paths] if isinstance(paths, str | Path) else paths
        files = [file for path in paths for file in find_files(Path(path), pattern, setting)]
    unique: dict[Path, Path] = {}
    for file in files:
        unique.setdefault(file.resolve(), file)
    documents = [document for file in unique.values() for document in _documents_in(file, text_column) if document.size]
    if not documents:
        raise ValueError(f"{setting}={paths}: all documents are empty")
    return documents


def find_files(path: Path, pattern: str, setting: str) -> list[Path]:
    """The file itself, or the files below a folder whose names match `pattern`, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{setting}={str(path)!r} does not exist")
    found = files_below(path)
    files = [file for file in found if _matches(file.relative_to(path), pattern)]
    if not files:
        counts = Counter(_ending(file) for file in found)
        endings = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5)) or "no files at all"
        raise ValueError(f"{setting}={str(path)!r} has no file that matches pattern={pattern!r} (it has {endings})")
    return files


def _matches(path: Path, pattern: str) -> bool:
    """Match a path with a pattern, ignoring the case of both endings."""
    return path.match(pattern) or _with_lower_ending(path).match(str(_with_lower_ending(Path(pattern))))


def _with_lower_ending(path: Path) -> Path:
    stem, *endings = path.name.split(".")
    return path.with_name(".".join([stem, *map(str.lower, endings)])) if path.name else path


def _ending(file: Path) -> str:
    inner = Path(file.stem).suffix if file.suffix.lower() in COMPRESSED else ""
    return inner + file.suffix or file.name


def split_documents(
    documents: Sequence[Document], val_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and a fraction of them, drawn by `seed`, to validate on.

    Raises:
        ValueError: one of the two would be empty.
    """
    total = len(documents)
    held_out = number_held_out(val_fraction, total, f"{total} documents", ", or set val_path")
    chosen = set(permutation(len(documents), seed)[:held_out].tolist())
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [document for index, document in enumerate(documents) if index in chosen]


def limit_bytes(documents: Sequence[Document], max_bytes: int | None, seed: int, setting: str) -> list[Document]:
    """Documents drawn by `seed` that together have at most `max_bytes`; None: all. `setting` is its name."""
    if max_bytes is None:
        return list(documents)
    chosen, room = [], max_bytes
    for index in permutation(len(documents), seed):
        if documents[index].size <= room:
            chosen.append(index)
            room -= documents[index].size
    if not chosen:
        smallest = min(document.size for document in documents)
        raise ValueError(f"{setting}={max_bytes} has room for no document: the smallest has {smallest} bytes")
    return [documents[index] for index in sorted(chosen)]


def _documents_in(file: Path, text_column: str) -> Iterator[Document]:
    if not is_jsonl(file):
        yield Document(str(file.resolve()), size_of(file), file)
        return
    for number, line in enumerate(lines_of(file), start=1):
        if line.strip():
            name = f"{file.resolve()}:{number}"
            text = _json_text(line, name, text_column)
            yield Document(name, len(text), text)


def _json_text(line: bytes, name: str, text_column: str) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{name} has no text in the column text_column={text_column!r} (it has {has})")
    # JSON can spell halves of surrogate pairs, which no encoding has.
    return text.encode("utf-8", "surrogatepass")
