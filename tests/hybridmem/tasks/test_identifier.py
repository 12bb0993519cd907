import re
from keyword import iskeyword
from pathlib import Path

import pytest

from hybridmem.data import list_documents
from hybridmem.data.corpora import split_documents
from hybridmem.tasks import Identifier, Task
from hybridmem.tasks.identifier import repeated_words, source_files

PADDING = "".join(f"x{line} = {line}\n" for line in range(20))
SOURCE = f"""naïve_name = first_name = 1
{PADDING}
# comment_word first_name "unbalanced
text = 'string_word' + "it's comment_word"
first_name = naïve_name + string_word + r"\\"
class import_name: lambda comment_word: first_name
"""


@pytest.fixture(scope="module")
def standard_library() -> Identifier:
    return Identifier()


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(SOURCE.replace("name", f"name{number}"))
    (tmp_path / "empty.py").write_text("")
    (tmp_path / ".hidden.py").write_text(SOURCE)
    (tmp_path / "latin.py").write_bytes(SOURCE.encode("latin-1"))
    return tmp_path


def test_words_that_come_again_in_the_code():
    source = SOURCE.encode()
    words = {}
    for last_start, last_end, start, stop in repeated_words(source):
        word = source[start:stop]
        assert source[last_start:last_end] == word
        assert not re.search(rb"\b" + word + rb"\b", source[last_end:start]), "the last occurrence is another one"
        words.setdefault(word.decode(), []).append(start)
    # Excluded: comments, strings, parts of words with accents, and keywords.
    assert set(words) == {"first_name", "string_word", "comment_word"}
    assert len(words["first_name"]) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_examples_of_the_standard_library(standard_library, split):
    seen = set()
    for index in range(60):
        example = standard_library.example(split, index)
        prompt, answer = example["prompt"].encode(), example["answer"].encode()
        assert len(prompt) <= 1024
        last = [match.span() for match in re.finditer(rb"(?<![\w])" + answer + rb"(?![\w])", prompt)][-1]
        assert example["distance"] == (len(prompt) - last[1]) // 256 >= 1
        assert 6 <= len(answer) <= 32
        assert answer.decode().isidentifier()
        assert not iskeyword(answer.decode())
        seen.add(answer)
    assert len(seen) > 30


def test_an_example_is_cut_out_of_one_of_the_splits_files(standard_library):
    for split in ("train", "val"):
        example = standard_library.example(split, 3)
        text = (example["prompt"] + example["answer"]).encode()
        assert any(text in file.read_bytes() for file in standard_library.files[split])


def test_files_are_split_as_the_text_data_splits_them(standard_library):
    train, val = split_documents(list_documents(None), 0.05, 0)
    assert standard_library.files["train"] == [document.source for document in train]
    assert standard_library.files["val"] == [document.source for document in val]


def test_an_example_follows_from_seed_split_and_index(folder):
    options = dict(path=str(folder), window=50, val_fraction=0.3)
    first, again, other = (Identifier(seed=seed, **options) for seed in (1, 1, 2))
    again.example("train", 0)  # examples do not depend on files read before
    assert first.example("train", 5) == again.example("train", 5)
    assert any(first.example("train", index) != other.example("train", index) for index in range(5))
    assert any(first.example("train", index) != first.example("train", 0) for index in range(1, 5))
    assert sorted(first.files["train"] + first.files["val"]) == sorted(folder.glob("[0-9l]*.py"))


def test_files_that_are_not_utf8_have_no_examples(folder):
    task = Identifier(path=str(folder), window=50, val_fraction=0.3)
    assert len(task.places_in(folder / "1.py")) > 0
    assert len(task.places_in(folder / "latin.py")) == 0


@pytest.mark.parametrize("context_length", [60, 61])
def test_a_prompt_can_begin_within_a_character(tmp_path, context_length):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"# {'é' * 40}\n{name}_name = 1111111111\n{name}_name")
    example = Identifier(8, context_length, path=str(tmp_path), val_fraction=0.5).example("train", 0)
    assert re.fullmatch(r"é+\n._name = 1111111111\n", example["prompt"])
    assert context_length - 2 < len(example["prompt"].encode()) <= context_length


def test_reward_ends_at_the_first_character_of_no_identifier(standard_library):
    completions = ["name", "name(self)", "name\n", "names", "", " name", "nam"]
    answer = ["name"] * len(completions)
    rewards = standard_library.reward(prompts=[""] * 7, completions=completions, answer=answer, completion_ids=[[]] * 7)
    assert rewards == standard_library.is_right(completions, answer) == [1, 1, 1, 0, 0, 0, 0]
    assert standard_library.max_completion_length == 33


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.py").write_text("one = 1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "b.py").symlink_to(tmp_path / "elsewhere" / "a.py")
    assert len(source_files(str(tmp_path / "folder"))) == 1


def test_it_is_a_task(standard_library):
    assert isinstance(standard_library, Task)


def test_refusals(folder):
    for options, message in [
        (dict(window=0), "window must be at least 1"),
        (dict(window=1024), r"context_length=1024 must be at least window \+ min_length = 1030"),
        (dict(max_length=5), "max_length=5 must be at least min_length=6"),
        (dict(val_fraction=0.0), "val_fraction must lie between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Identifier(**options)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Identifier(path=str(folder / "none"))
    too_far = Identifier(path=str(folder), window=10_000, context_length=20_000, val_fraction=0.3)
    with pytest.raises(ValueError, match=r"no train file has an identifier .* window=10000"):
        too_far.example("train", 0)
