"""Documents from files and folders, and their split into training and validation."""

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
    """A file, or one text in a file.

    Args:
        name: the document's name in error messages.
        size: the decompressed size in bytes.
        source: the file to read on demand, or the bytes themselves.
    """

    name: str
    size: int
    source: Path | bytes

    def read(self) -> bytes:
        """Return the document's bytes, decompressed."""
        return self.source if isinstance(self.source, bytes) else read_file(self.source)


def standard_library_files() -> list[Path]:
    """Return all .py files of the running interpreter's standard library (about 30 MB), sorted."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [file for file in files_below(folder) if file.suffix == ".py"]


def list_documents(
    paths: str | Path | Sequence[str | Path] | None,
    *,
    pattern: str = "*.py",
    text_column: str = "text",
    setting: str = "path",
) -> list[Document]:
    """Return the distinct non-empty documents of files and folders.

    Folders are searched recursively, also through links, for files that match `pattern`; hidden files, __pycache__ and
    site-packages are skipped. A .jsonl file gives one document per line. Files that end in .gz, .bz2 or .xz are
    decompressed. File endings are case-insensitive. None reads the standard library. `setting` is the name of `paths`
    in error messages.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A folder has no matching file, a line is invalid, a file cannot be decompressed, or all documents
            are empty.
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
        raise ValueError(f"{setting}={paths} contains only empty documents; set it to files with text")
    return documents


def find_files(path: Path, pattern: str, setting: str) -> list[Path]:
    """Return the file itself, or the files in a folder that match `pattern`, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{setting}={str(path)!r} does not exist; set it to a file or a folder")
    found = files_below(path)
    files = [file for file in found if _matches(file.relative_to(path), pattern)]
    if not files:
        counts = Counter(_ending(file) for file in found)
        endings = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5)) or "no files at all"
        raise ValueError(
            f"{setting}={str(path)!r} has no file that matches pattern={pattern!r} (it has {endings}); change pattern"
        )
    return files


def _matches(path: Path, pattern: str) -> bool:
    """Match a path with a pattern, ignoring the case of file endings."""
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
    """Split documents at random into training documents and a fraction of validation documents.

    Raises:
        ValueError: There is only one document.
    """
    total = len(documents)
    held_out = number_held_out(val_fraction, total, "documents", "split the file, or set val_path")
    chosen = set(permutation(len(documents), seed)[:held_out].tolist())
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [document for index, document in enumerate(documents) if index in chosen]


def limit_bytes(documents: Sequence[Document], max_bytes: int | None, seed: int, setting: str) -> list[Document]:
    """Draw documents with at most `max_bytes` in total, or return all for None; errors name `setting`."""
    if max_bytes is None:
        return list(documents)
    chosen, room = [], max_bytes
    for index in permutation(len(documents), seed):
        if documents[index].size <= room:
            chosen.append(index)
            room -= documents[index].size
    if not chosen:
        smallest = min(document.size for document in documents)
        raise ValueError(f"{setting}={max_bytes} is too small for any document; set it to at least {smallest}")
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
        raise ValueError(
            f"{name} has no text in text_column={text_column!r} (it has {has}); set text_column to a column with text"
        )
    # JSON allows unpaired surrogates, which strict UTF-8 cannot encode.
    return text.encode("utf-8", "surrogatepass")
