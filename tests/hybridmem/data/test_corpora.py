import bz2
import gzip
import json
import lzma
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridmem.data import Document, list_documents, standard_library_files
from hybridmem.data.corpora import limit_bytes, split_documents

from .helpers import write_files, write_jsonl


def texts(documents: list[Document]) -> list[bytes]:
    return [document.read() for document in documents]


def made_up(sizes: list[int]) -> list[Document]:
    return [Document(str(index), size, b"x" * size) for index, size in enumerate(sizes)]


def test_standard_library():
    files = standard_library_files()
    names = [file.relative_to(sysconfig.get_path("stdlib")).as_posix() for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("-packages" in name or "__pycache__" in name for name in names)
    assert {document.source for document in list_documents(None)} <= set(files)


def test_folders_files_and_lines_together(tmp_path):
    folder = write_files(tmp_path / "code", count=3)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.py").write_bytes(b"more \xff")
    (folder / "notes.txt").write_text("not asked for")
    (folder / "empty.py").touch()
    for hidden in (".hidden.py", ".git/object.py", "__pycache__/cached.py", "site-packages/other.py"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("hidden")
    lines = write_jsonl(tmp_path / "lines.jsonl", ["one", "", "two\n"])

    documents = list_documents([str(folder), str(lines), str(folder / "notes.txt")], pattern="*.py")
    names = [Path(document.name).name for document in documents]
    expected = ["more.py", "file_000.py", "file_001.py", "file_002.py", "lines.jsonl:1", "lines.jsonl:3", "notes.txt"]
    assert names == expected
    assert texts(documents)[0] == b"more \xff"
    assert texts(documents)[-3:] == [b"one", b"two\n", b"not asked for"]
    assert all(document.size == len(document.read()) for document in documents)


def test_a_file_named_twice_is_one_document(tmp_path):
    folder = write_files(tmp_path, count=3)
    assert len(list_documents([folder, folder / "file_001.py", str(folder) + "/../" + folder.name])) == 3


def test_column_and_pattern(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"], column="body")
    assert texts(list_documents(tmp_path, pattern="*.jsonl", text_column="body")) == [b"x", b"y"]


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*/absent' does not exist"):
        list_documents(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no file that matches pattern='\*\.py' \(it has no files at all\)"):
        list_documents(tmp_path)
    write_files(tmp_path, count=2, suffix=".txt")
    with pytest.raises(ValueError, match=r"no file that matches pattern='\*\.py' \(it has 2 \.txt\)"):
        list_documents(tmp_path)
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="contains only empty documents"):
        list_documents(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad\.jsonl:2 is not JSON"),
        (
            json.dumps({"body": "x"}),
            r"bad\.jsonl:2 has no text in text_column='text' \(it has \['body'\]\)",
        ),
        (json.dumps({"text": 3}), r"bad\.jsonl:2 has no text in text_column"),
        (json.dumps(["x"]), r"bad\.jsonl:2 has no text .*\(it has list\)"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        list_documents(tmp_path / "bad.jsonl")


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_shares_out_every_document(count, fraction, seed):
    documents = made_up([1] * count)
    train, val = split_documents(documents, fraction, seed)
    assert train
    assert val
    assert len(val) in (1, count - 1) or len(val) == round(count * fraction)
    assert sorted(train + val, key=documents.index) == documents
    assert split_documents(documents, fraction, seed) == (train, val)


def test_few_documents_leave_one_for_validation():
    for count, fraction, held_out in ((2, 0.05, 1), (19, 0.01, 1), (3, 0.99, 2)):
        _, val = split_documents(made_up([1] * count), fraction, seed=0)
        assert len(val) == held_out


def test_one_document_cannot_be_split():
    said = "val_fraction=0.05 holds out at least one of two or more documents, but there is 1: split the file, or set"
    with pytest.raises(ValueError, match=said):
        split_documents(made_up([9]), 0.05, seed=0)


def test_split_depends_on_the_seed():
    documents = made_up([1] * 100)
    assert split_documents(documents, 0.1, 0) != split_documents(documents, 0.1, 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 400), st.integers(0, 3))
def test_limit_takes_what_fits(sizes, limit, seed):
    documents = made_up(sizes)
    if limit < min(sizes):
        with pytest.raises(ValueError, match=f"max_bytes={limit} is too small for any document"):
            limit_bytes(documents, limit, seed, "max_bytes")
        return
    chosen = limit_bytes(documents, limit, seed, "max_bytes")
    room = limit - sum(document.size for document in chosen)
    assert room >= 0
    assert all(document.size > room for document in documents if document not in chosen)
    assert chosen == limit_bytes(documents, limit, seed, "max_bytes")


def test_no_limit():
    assert limit_bytes(made_up([3, 4]), None, 0, "max_bytes") == made_up([3, 4])


def names(documents: list[Document]) -> list[str]:
    return [Path(document.name).name for document in documents]


def test_linked_folders_are_read_and_cycles_end(tmp_path):
    elsewhere = write_files(tmp_path / "elsewhere", count=2)
    write_files(elsewhere / "deep", count=1, suffix=".more.py")
    folder = write_files(tmp_path / "folder", count=0)
    (folder / "own.py").write_text("own")
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "itself").symlink_to(elsewhere)
    (folder / "broken").symlink_to(tmp_path / "absent")
    (folder / "loop.py").symlink_to(folder / "loop.py")
    for paths in (folder, [folder, elsewhere], [elsewhere, folder]):
        found = list_documents(paths)
        assert sorted(names(found)) == ["file_000.more.py", "file_000.py", "file_001.py", "own.py"]
        assert found[0].name.startswith(str(tmp_path.resolve()))


def test_a_linked_file_is_one_document(tmp_path):
    folder = write_files(tmp_path, count=2)
    (folder / "another_name.py").symlink_to(folder / "file_000.py")
    (folder / "deep").mkdir()
    (folder / "deep" / "same.py").symlink_to(folder / "file_001.py")
    assert sorted(names(list_documents(folder))) == ["file_000.py", "file_001.py"]
    assert names(list_documents(folder, pattern="same.py")) == ["file_001.py"]


def test_hidden_and_installed_folders_are_skipped_also_through_links(tmp_path):
    write_files(tmp_path / "outside" / ".hidden", count=1)
    write_files(tmp_path / "outside" / "site-packages", count=1)
    write_files(tmp_path / "outside" / "seen", count=1)
    folder = write_files(tmp_path / "folder", count=0)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / ".git").symlink_to(tmp_path / "outside")
    assert len(list_documents(folder)) == 1


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".GZ": gzip.compress}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_text_is_read_like_text(tmp_path, ending):
    text = "naïve text\n" * 200_000  # exceeds one decompression buffer
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two\n"))
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines.encode()))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](text.encode()))
    (tmp_path / f"c.txt{ending}").write_bytes(COMPRESS[ending](b""))
    found = list_documents(tmp_path, pattern=f"*{ending}")
    assert names(found) == [f"a.jsonl{ending}:1", f"a.jsonl{ending}:3", f"b.txt{ending}"]
    assert texts(found) == [b"one", b"two\n", text.encode()]
    assert [document.size for document in found] == [3, 4, len(text.encode())]
    assert texts(list_documents(tmp_path / f"b.txt{ending}")) == [text.encode()]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("damage", [lambda x: x[:-5], lambda x: b"plain text", lambda x: x[:30] + b"?" + x[31:]])
def test_damaged_compressed_files_are_named(tmp_path, ending, name, damage):
    content = COMPRESS[ending](b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(99)))
    file = tmp_path / (name + ending)
    file.write_bytes(damage(content))
    with pytest.raises(
        ValueError, match=f"{name}{ending} cannot be decompressed .*: fetch it again, or remove the extension"
    ):
        list_documents(file)


def test_the_case_of_an_ending_does_not_matter(tmp_path):
    for name in ("A.JSONL", "b.Jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    for pattern in ("*.jsonl", "*.JSONL"):
        assert texts(list_documents(tmp_path, pattern=pattern)) == [b"A.JSONL", b"b.Jsonl", b"c.jsonl"]


def test_the_case_of_a_name_matters(tmp_path):
    write_files(tmp_path, count=1, suffix=".TXT")
    assert len(list_documents(tmp_path, pattern="file*.txt")) == 1
    with pytest.raises(ValueError, match=r"pattern='FILE\*.txt' \(it has 1 \.TXT\)"):
        list_documents(tmp_path, pattern="FILE*.txt")


def test_errors_list_endings_of_compressed_files(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match=r"\(it has 1 \.txt\.gz\)"):
        list_documents(tmp_path, pattern="*.txt")
