import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridmem.tasks import Recall, Task


def pairs(prompt: str) -> dict[str, str]:
    found = re.findall(r"(\w+)=(\w+) ", prompt)
    assert len(dict(found)) == len(found), "a key stands twice"
    return dict(found)


def question(prompt: str) -> str:
    return re.search(r"\?(\w+)=$", prompt)[1]


@settings(max_examples=100, deadline=None)
@given(
    num_pairs=st.integers(1, 12),
    key_length=st.integers(2, 4),
    hops=st.integers(1, 3),
    num_distractors=st.integers(0, 4),
    distance=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    window=st.integers(8, 40),
    index=st.integers(0, 5),
)
def test_examples(num_pairs, key_length, hops, num_distractors, distance, window, index):
    value_length = key_length if hops > 1 else 3
    settings = dict(key_length=key_length, value_length=value_length, hops=hops, num_distractors=num_distractors)
    try:
        task = Recall(num_pairs=num_pairs, distance=distance, window=window, **settings)
    except ValueError:
        assume(False)
    example = task.example("train", index)
    prompt, answer = example["prompt"], example["answer"]
    known, asked = pairs(prompt), question(prompt)
    assert len(known) == num_pairs
    assert {len(key) for key in known} == {key_length}
    assert {len(value) for value in known.values()} == {value_length}

    chain, key = [], asked
    for _ in range(hops):
        key = known[key]
        chain.append(key)
    assert answer == "=".join(chain)
    assert len(answer) + 1 == task.max_completion_length

    near = [other for other in known if sum(a != b for a, b in zip(other, asked, strict=True)) == 1]
    assert len(near) >= num_distractors

    pair = f"{asked}={known[asked]} "
    assert len(prompt) - (prompt.index(pair) + len(pair) - 1) == example["distance"] * window
    assert example["distance"] in distance
    assert len(prompt) == max(distance) * window + len(pair) - 1


def test_filler_is_words_between_the_pairs():
    prompt = Recall(num_pairs=3, distance=[8], seed=4).example("val", 1)["prompt"]
    assert re.fullmatch(r"( *([a-z]+|[a-z]{2}=[a-z]{3}) *)+ \?[a-z]{2}=", prompt)
    words = re.sub(r"\S*=\S*", "", prompt).split()
    assert len(words) > 10


def test_all_distances_and_all_places_are_drawn():
    task = Recall(num_pairs=4, distance=[1, 3])
    examples = [task.example("train", index) for index in range(60)]
    assert {example["distance"] for example in examples} == {1, 3}
    asked_first = [example["prompt"].index(f"{question(example['prompt'])}=") for example in examples]
    assert len(set(asked_first)) == 2  # one position per distance
    others = {prompt.index(f"{key}=") for prompt in (e["prompt"] for e in examples) for key in pairs(prompt)}
    assert len(others) > 50


def test_an_example_follows_from_seed_split_and_index():
    task = Recall(seed=3)
    assert task.example("train", 7) == Recall(seed=3).example("train", 7)
    prompts = [
        Recall(seed=seed).example(split, index)["prompt"]
        for seed, split, index in [(3, "train", 7), (3, "val", 7), (3, "train", 8), (4, "train", 7)]
    ]
    assert len(set(prompts)) == 4
    seen = {task.example("train", index)["prompt"] for index in range(500)}
    assert not seen & {task.example("val", index)["prompt"] for index in range(500)}


def test_reward():
    task = Recall()
    completions = ["abc", "abc \n", "abd", "abcd", "", " abc"]
    columns = dict(answer=["abc"] * 6, completion_ids=[[0]] * 6, distance=[1] * 6)
    assert task.reward(prompts=["?"] * 6, completions=completions, **columns) == [1, 1, 0, 0, 0, 0]
    partial = Recall(partial_credit=True).reward(prompts=["?"] * 6, completions=completions, **columns)
    assert partial == pytest.approx([1, 1, 2 / 3, 3 / 4, 0, 0])


def test_it_is_a_task():
    assert isinstance(Recall(), Task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_pairs=0), "num_pairs must be at least 1"),
        (dict(distance=[]), "distance is empty"),
        (dict(distance=[0, 1]), "distance must be at least 1"),
        (dict(distance=[10**9]), "times window=32 must be below 10000000 bytes"),
        (dict(distance=[3, 10**6], window=16), "distance=1000000 times window=16 must be below 10000000 bytes"),
        (dict(hops=2), "set value_length=3 to key_length=2"),
        (dict(num_distractors=6), r"num_pairs=6 must be at least hops \+ num_distractors = 7"),
        (dict(key_length=1, num_pairs=27, window=500), "key_length=1 gives 26 keys"),
        (dict(key_length=1, num_pairs=40, num_distractors=26, window=900), "25 of them one letter from the asked one"),
        (dict(window=4, distance=[1]), "window=4 is too short for the question of 4 bytes"),
        (dict(num_pairs=30), "num_pairs=30 of 7 bytes do not fit: with distance=1 out of .* and window=32"),
        (dict(seed=-1), "seed must be at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Recall(**options)


def test_examples_count_from_0():
    with pytest.raises(ValueError, match="index=-1 must be at least 0"):
        Recall().example("val", -1)
