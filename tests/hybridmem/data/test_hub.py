"""Streaming of local files through the real `datasets` library."""

import re
import sys
from itertools import islice

import pytest
import torch

from hybridmem.data import HubDataModule, byte_tokenizer
from hybridmem.data.streaming import START

from .helpers import LIGHTNING_WARNINGS, Recorder, byte_level_bpe, gapped_tokenizer, trainer, write_jsonl

pytestmark = [
    *LIGHTNING_WARNINGS,
]
STEPS = 14
FILES, LINES = 4, 30


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    return [
        str(write_jsonl(folder / f"{file}.jsonl", [text(file, line) for line in range(LINES)])) for file in range(FILES)
    ]


def text(file: int, line: int) -> str:
    return f"<{file}-{line:02d}>" + "ab\n" * (line % 7)


def data(files, setup=False, **options) -> HubDataModule:
    settings = dict(data_files=files, sequence_length=40, batch_size=3, val_documents=5, shuffle_documents=7)
    module = HubDataModule("json", **{**settings, **options})
    if setup:
        module.setup("fit")
    return module


def files_of(batches) -> set[str]:
    """Return the files of the documents in some batches."""
    seen = "\n".join(byte_tokenizer().decode(row) for batch in batches for row in batch["input_ids"])
    return set(re.findall(r"<(\d)-\d\d>", seen))


def rows_of_pass(module) -> int:
    return sum(1 for _ in iter_pass(module))


def iter_pass(module):
    rows = module.train_stream().rows(START)
    for row, place in rows:
        if place["passes"]:
            return
        yield row


def test_a_pass_has_every_document_but_those_held_out(files):
    module = data(files, setup=True)
    rows = list(iter_pass(module))
    labels = torch.cat([row["shift_labels"] for row in rows])
    expected = [text(file, line) for file in range(FILES) for line in range(LINES)][5:]
    assert (labels != -100).sum() == sum(len(t) + 1 for t in expected)
    assert (labels == 258).sum() == len(expected)
    seen = byte_tokenizer().decode(labels[labels != -100])
    assert not any(text(0, line)[:6] in seen for line in range(5))
    held_out = torch.cat([batch["shift_labels"].flatten() for batch in module.val_dataloader()])
    assert (held_out == 258).sum() == 5
    assert (held_out != -100).sum() == sum(len(text(0, line)) + 1 for line in range(5))


def test_batches(files):
    module = data(files, setup=True)
    assert module.vocab_size == 259
    assert module.token_byte_lengths.sum() == 256
    for batch in islice(module.train_dataloader(), 5):
        assert set(batch) == {"input_ids", "shift_labels", "document_ids"}
        assert all(value.shape == (3, 40) and value.dtype == torch.int64 for value in batch.values())


def test_copies_of_held_out_documents_are_left_out(tmp_path):
    file = write_jsonl(tmp_path / "copies.jsonl", ["held out", "train", "held out", "", "more"])
    module = data([str(file)], setup=True, val_documents=1)
    seen = byte_tokenizer().decode(torch.cat([row["input_ids"] for row in iter_pass(module)]))
    assert "train" in seen
    assert "more" in seen
    assert "held out" not in seen


def test_order_follows_from_the_seed(files):
    def inputs(**options):
        return [batch["input_ids"] for batch in islice(data(files, setup=True, **options).train_dataloader(), 8)]

    first, again, other = inputs(seed=1), inputs(seed=1), inputs(seed=2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_passes_follow_each_other_in_new_order(files):
    module = data(files, setup=True)
    count = rows_of_pass(module)
    rows = [row["input_ids"] for row, _ in islice(module.train_stream().rows(START), 2 * count)]
    first, second = ("".join(map(chr, torch.cat(part).tolist())) for part in (rows[:count], rows[count:]))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_stream_resumes_at_every_place(files):
    stream = data(files, setup=True).train_stream()
    whole = list(islice(stream.rows(START), 260))
    for stop in (1, 30, 100, 150, 200):
        rest = islice(stream.rows(whole[stop - 1][1]), 40)
        assert all(
            torch.equal(row["input_ids"], again["input_ids"])
            for (row, _), (again, _) in zip(whole[stop : stop + 40], rest, strict=True)
        ), stop


def train(files, folder, max_steps, ckpt_path=None, data_options=None, **options):
    recorder = Recorder()
    run = trainer(folder, max_steps=max_steps, limit_val_batches=1, **options)
    run.fit(recorder, data(files, **(data_options or {})), ckpt_path=ckpt_path)
    return run, recorder.seen


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}])
def test_a_resumed_run_sees_the_same_batches(files, tmp_path, num_workers, options):
    workers = {"num_workers": num_workers}
    everything = train(files, tmp_path, STEPS, data_options=workers)[1]
    for stop in (5, 8):
        run, seen = train(files, tmp_path, stop, data_options=workers, **options)
        assert seen == everything[:stop]
        run.save_checkpoint(tmp_path / "stopped.ckpt")
        assert train(files, tmp_path, STEPS, tmp_path / "stopped.ckpt", workers, **options)[1] == everything[stop:]


def test_workers_share_the_files(files):
    batches = list(islice(data(files, setup=True, num_workers=2).train_dataloader(), 16))
    first, second = files_of(batches[::2]), files_of(batches[1::2])
    assert len(first) == len(second) == 2
    assert not first & second


def test_other_workers_cannot_go_on(files, tmp_path):
    run, _ = train(files, tmp_path, 3)
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ValueError, match="resume with the checkpoint's number of devices and num_workers"):
        train(files, tmp_path, 6, tmp_path / "stopped.ckpt", {"num_workers": 2})


def test_validation_and_test_after_training(files, tmp_path):
    module, recorder = data(files), Recorder()
    run = trainer(tmp_path, max_steps=2)
    run.fit(recorder, module)
    run.validate(recorder, module, verbose=False)
    assert [type(loader) for loader in module.test_dataloader()] == [type(module.val_dataloader())]


def test_hugging_face_tokenizer(files, tmp_path):
    byte_level_bpe().save_pretrained(tmp_path)
    module = data(files, setup=True, tokenizer=str(tmp_path))
    assert next(iter(module.train_dataloader()))["input_ids"].max() < module.vocab_size == len(byte_level_bpe())


def test_a_vocabulary_with_gaps(files, tmp_path):
    gapped_tokenizer(300).save_pretrained(tmp_path)
    module = data(files, setup=True, tokenizer=str(tmp_path))
    assert next(iter(module.train_dataloader()))["input_ids"].max() == 350
    assert module.vocab_size == len(module.token_byte_lengths) == 351


def test_refusals(files, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"text_column='body' is not a column of dataset='json'.*; set it to one of text, number"
    ):
        data(files, setup=True, text_column="body")
    with pytest.raises(ValueError, match=r"text_column='number' of dataset='json'.* contains '0' instead of text"):
        data(files, setup=True, text_column="number")
    with pytest.raises(ValueError, match="set num_workers to at most 4"):
        data(files, setup=True, num_workers=5).train_dataloader()
    with pytest.raises(ValueError, match="dataset='json' is a format and needs files; set data_files"):
        data(None)
    with pytest.raises(ValueError, match="shuffle_documents must be at least 1"):
        data(files, shuffle_documents=0)
    with pytest.raises(ValueError, match="the training stream is endless: set the trainer's max_steps"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), data(files))
    with pytest.raises(ValueError, match="no documents are left for training"):
        next(iter(data(files, setup=True, val_documents=1000).train_dataloader()))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install hybridmem\[data\]"):
        data(files, setup=True)
