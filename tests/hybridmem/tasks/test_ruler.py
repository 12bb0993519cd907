import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem.data import TaskDataModule, byte_tokenizer
from hybridmem.data.task_module import count_tokens
from hybridmem.tasks import Ruler, Task
from hybridmem.tasks.ruler import SUBTASKS, string_match_all, string_match_part
from hybridmem.tasks.ruler.fit import NoCutError, TooShortError, cut, fit
from hybridmem.tasks.ruler.ruler import expected
from tests.hybridmem.data.helpers import byte_level_bpe, gapped_tokenizer, sentencepiece_bpe

TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bpe": byte_level_bpe,
    "sentencepiece": sentencepiece_bpe,
    "gapped": gapped_tokenizer,
}
TEMPLATE = "<|end|>user: {{ messages[0]['content'] }}\nmodel:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of random words in sentences, some of them not ASCII."""
    path, draw = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    words = ["".join(draw.choice(list("abdeiklmnorst"), draw.integers(3, 9))) for _ in range(300)] + ["naïve", "日本"]
    for n in range(10):
        sentences = [" ".join(draw.choice(words, draw.integers(3, 12))).capitalize() + "." for _ in range(60)]
        paragraphs = [" ".join(sentences[start : start + 3]) for start in range(0, 60, 3)]
        (path / f"{n}.txt").write_text("\n\n".join(paragraphs))
    return path


def ruler(folder, **options) -> Ruler:
    return Ruler(path=str(folder), pattern="*.txt", **{"val_fraction": 0.2, **options})


def counter(name: str):
    return partial(count_tokens, TOKENIZERS[name](), False)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1500, 6000),
    subtask=st.sampled_from(SUBTASKS),
    index=st.integers(0, 50),
    split=st.sampled_from(["train", "val"]),
    tokenizer=st.sampled_from([None, *TOKENIZERS]),
    begin_answer=st.booleans(),
)
def test_examples(folder, num_tokens, subtask, index, split, tokenizer, begin_answer):
    def task() -> Ruler:
        made = ruler(folder, num_tokens=num_tokens, subtasks=[subtask], begin_answer=begin_answer)
        if tokenizer is not None:
            made.measure_with(counter(tokenizer))
        return made

    example = task().example(split, index)
    prompt, answer = example["prompt"], example["answer"]
    count = (lambda text: len(text.encode())) if tokenizer is None else counter(tokenizer)
    assert count(prompt) == num_tokens
    assert example["subtask"] == subtask
    assert all(text in prompt for text in expected(answer))
    assert len(set(expected(answer))) == len(expected(answer))
    assert answer.startswith(" ") == begin_answer
    assert prompt.endswith("?") != begin_answer
    assert len(answer) < task().max_completion_length
    assert example == task().example(split, index)
    assert example["answer"] != task().example(split, index + 1)["answer"]


def solve(prompt: str) -> set[str]:
    """Return the answer that a careful reader gives."""
    *_, question = prompt.split("\n\n")
    context = prompt[: -len(question)]
    if "magic number" in question:
        keys = set(re.findall(r"[a-z]+-[a-z]+", question))
        return {
            value
            for key, value in re.findall(r"The magic number of ([a-z]+-[a-z]+) is (\d+)\.", context)
            if key in keys
        }
    if "variables" in question:
        assigned: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context):
            assigned[name] = assigned.get(source, source)
        (value,) = re.findall(r"value (\d+)", question)
        return {name for name, held in assigned.items() if held == value}
    pattern, asked = (r"\d+\. (\w+)", 10) if "list" in question else (r"(?<!\S)[a-z]{6}(?!\S)", 3)
    words = re.findall(pattern, context.split("\n")[-3])
    names, counts = np.unique(words, return_counts=True)
    order = np.argsort(-counts)
    assert counts[order[asked - 1]] > counts[order[asked]]
    return set(names[order[:asked]].tolist())


@pytest.mark.parametrize("num_tokens", [1500, 5000, 60_000])
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_careful_reader_finds_the_answer(folder, subtask, num_tokens):
    task = ruler(folder, num_tokens=num_tokens, subtasks=[subtask], num_chains=3, num_keys=6)
    for index in range(4):
        example = task.example("val", index)
        assert solve(example["prompt"]) == set(expected(example["answer"]))


def test_common_words_stay_common_in_long_lists(folder):
    example = ruler(folder, num_tokens=300_000, subtasks=["common_words"]).example("val", 0)
    words = re.findall(r"\d+\. (\w+)", example["prompt"])
    names, counts = np.unique(words, return_counts=True)
    common = np.isin(names, expected(example["answer"]))
    assert len(names) > 200
    assert counts[common].min() > 7 * counts[~common].max()


def test_needles_lie_at_any_depth(folder):
    task = ruler(folder, num_tokens=4000, subtasks=["single"])
    depths = []
    for index in range(60):
        example = task.example("train", index)
        depths.append(example["prompt"].index(example["answer"]) / 4000)
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert 0.35 < np.mean(depths) < 0.65


def test_subtasks_take_turns(folder):
    task = ruler(folder, num_tokens=2000)
    assert [task.example("val", index)["subtask"] for index in range(16)] == [*SUBTASKS, *SUBTASKS]


def test_the_standard_library_gives_text():
    example = Ruler(num_tokens=700, subtasks=["multi_key"]).example("val", 0)
    assert len(example["prompt"].encode()) == 700
    assert example["answer"] in example["prompt"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_data_module_counts_with_its_tokenizer(folder, tmp_path, chat):
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    task = ruler(folder, num_tokens=3000)
    data = TaskDataModule(task, mode="prompts", tokenizer=str(tmp_path), chat_template=chat, num_val=8)
    data.setup()
    lengths = {len(data.prompt(task.example("val", index)).tokens) for index in range(8)}
    assert lengths == {3000}


def test_scores():
    assert string_match_all("It is ABC and def", ["abc", "xyz"]) == 0.5
    assert string_match_part("It is ABC and def", ["abc", "xyz"]) == 1
    assert string_match_part("nothing", ["abc", "xyz"]) == 0


def test_rewards(folder):
    completions, answer = ["The numbers are 12 and 34.", "12", "none"], ["12, 34"] * 3
    task = ruler(folder)
    assert task.reward([""] * 3, completions, answer) == [1.0, 0.5, 0.0]
    assert ruler(folder, scoring="part").reward([""] * 3, completions, answer) == [1.0, 1.0, 0.0]
    assert task.is_right(completions, answer) == [True, False, False]
    assert isinstance(task, Task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(subtasks=[]), r"subtasks=\[\] is empty"),
        (dict(num_keys=0), "num_keys must be at least 1, not 0"),
        (dict(num_tokens=10_000_000), "num_tokens must be at most 2097152"),
        (dict(val_fraction=1.0), "val_fraction must lie between 0 and 1"),
    ],
)
def test_impossible_settings(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ruler(folder, **options)


def test_too_few_tokens(folder):
    task = ruler(folder, num_tokens=100, subtasks=["single", "common_words"])
    with pytest.raises(ValueError, match="num_tokens=100 is too short for subtask single, which takes at least 1"):
        task.example("val", 0)
    with pytest.raises(ValueError, match="num_tokens=100 is too short for subtask"):
        task.measure_with(counter("bytes"))
    task.num_tokens = 400
    with pytest.raises(ValueError, match="num_tokens=400 is too short for subtask common_words"):
        task.measure_with(counter("bytes"))


def test_too_few_words(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text("The same five words again and again, in every file.")
    with pytest.raises(ValueError, match="the training files hold 5 different words"):
        Ruler(path=str(tmp_path), pattern="*.txt", val_fraction=0.5).example("val", 0)


def test_fit_refuses_what_cannot_be():
    def parts(size: int) -> tuple[str, str]:
        return "a", "b" * size

    assert fit(parts, "c" * 500, 300, len).strip("abc") == ""
    with pytest.raises(TooShortError, match="has 2 tokens"):
        fit(parts, "c" * 500, 1, len)
    with pytest.raises(NoCutError):
        fit(parts, "c" * 500, 301, lambda text: 2 * len(text))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 80))
def test_cut_finds_every_length_of_a_growing_measure(steps, target):
    measure = np.cumsum(steps)
    found = cut(lambda length: int(measure[length - 1]), target, len(steps))
    assert (found is None) == (target not in measure)
    assert found is None or measure[found - 1] == target
