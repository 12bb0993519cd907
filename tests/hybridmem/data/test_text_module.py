from itertools import pairwise

import lightning as L
import pytest
import torch

from hybridmem.data import TextDataModule, byte_tokenizer
from hybridmem.data import text_module as module_file

from .helpers import (
    LIGHTNING_WARNINGS,
    Recorder,
    byte_level_bpe,
    gapped_tokenizer,
    trainer,
    write_files,
    write_jsonl,
)

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "files")


def data(path, **options) -> TextDataModule:
    settings = dict(path=str(path), sequence_length=64, batch_size=4, val_fraction=0.2)
    module = TextDataModule(**{**settings, **options})
    module.setup()
    return module


def text_of(loader) -> str:
    ids = torch.cat([batch["input_ids"][batch["document_ids"] != -1] for batch in loader])
    return byte_tokenizer().decode(ids)


@pytest.mark.parametrize("mode", ["packed", "continuous"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches(folder, mode, num_workers):
    module = data(folder, mode=mode, num_workers=num_workers, val_sequence_length=50, val_batch_size=3)
    for loader, shape in ((module.train_dataloader(), (4, 64)), (module.val_dataloader(), (3, 50))):
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert set(batch) == {"input_ids", "shift_labels", "document_ids"}
            assert all(value.dtype == torch.int64 for value in batch.values())
            assert all(value.shape[1:] == shape[1:] and len(value) <= shape[0] for value in batch.values())
        assert all(len(batch["input_ids"]) == shape[0] for batch in batches[:-1])


def test_attributes_after_setup(folder):
    module = data(folder)
    assert module.vocab_size == len(module.tokenizer) == 259
    assert module.token_byte_lengths.tolist() == [1] * 256 + [0] * 3


def test_files_are_never_in_both_splits(folder):
    module = data(folder)
    documents = module.find_documents()
    train, val = ({document.name for document in documents[split]} for split in ("train", "val"))
    assert len(val) == 2
    assert not train & val
    assert len(train | val) == 12
    seen = {
        split: text_of(loader)
        for split, loader in (("train", module.train_dataloader()), ("val", module.val_dataloader()))
    }
    for name in range(12):
        held_out = f"file_{name:03d} = 3" in seen["val"]
        assert held_out == any(f"file_{name:03d}" in path for path in val)
        assert not (held_out and f"file_{name:03d}" in seen["train"])


def test_lines_are_split_like_files(tmp_path):
    module = data(write_jsonl(tmp_path / "lines.jsonl", [f"line {index}\n" * 5 for index in range(20)]))
    assert len(module.corpora["train"]) == 16
    assert len(module.corpora["val"]) == 4


def test_validation_does_not_change_with_the_seed(folder):
    first, second = data(folder, seed=1), data(folder, seed=2)
    assert text_of(first.val_dataloader()) == text_of(second.val_dataloader())
    assert text_of(first.train_dataloader()) != text_of(second.train_dataloader())
    assert text_of(data(folder, split_seed=1).val_dataloader()) != text_of(first.val_dataloader())


def test_separate_validation_is_not_trained_on(folder):
    module = data(folder, val_path=[str(folder / "file_001.py"), str(folder / "file_002.py")])
    assert len(module.corpora["val"]) == 2
    assert len(module.corpora["train"]) == 10
    assert "file_001" not in text_of(module.train_dataloader())
    with pytest.raises(ValueError, match="contains all documents of path"):
        data(folder, val_path=str(folder))


def test_limits(folder):
    module = data(folder, max_bytes=1000, max_val_bytes=400, sequence_length=32)
    sizes = {split: len(corpus.text) for split, corpus in module.corpora.items()}
    assert 600 < sizes["train"] <= 1000
    assert 0 < sizes["val"] <= 400


def test_continuous_batches_go_on(folder):
    module = data(folder, mode="continuous", sequence_length=32)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batches = list(loader)
        for before, after in pairwise(batches):
            goes_on = (after["document_ids"][:, 0] != -1) & (before["shift_labels"][:, -1] != -100)
            assert torch.equal(after["input_ids"][goes_on, 0], before["shift_labels"][goes_on, -1])
            assert torch.equal(after["document_ids"][goes_on, 0], before["document_ids"][goes_on, -1])


def test_a_vocabulary_with_gaps(folder, tmp_path):
    gapped_tokenizer(1000).save_pretrained(tmp_path / "gapped")
    module = data(folder, tokenizer=str(tmp_path / "gapped"), sequence_length=8)
    assert module.vocab_size == len(module.token_byte_lengths) == 1051
    assert module.corpora["train"].tokens.max() == 1050
    assert next(iter(module.train_dataloader()))["input_ids"].max() > 1000


def test_hugging_face_tokenizer(folder, tmp_path):
    byte_level_bpe().save_pretrained(tmp_path / "bpe")
    module = data(folder, tokenizer=str(tmp_path / "bpe"), needle_lengths=[200])
    assert module.vocab_size == len(byte_level_bpe())
    for loader in (module.train_dataloader(), *module.test_dataloader()):
        batch = next(iter(loader))
        assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < module.vocab_size
    lengths = module.token_byte_lengths[torch.from_numpy(module.corpora["val"].text.astype(int))]
    assert lengths.sum() == sum(document.size for document in module.find_documents()["val"])


def test_needles_come_after_the_validation_rows(folder):
    module = data(folder, needle_lengths=[100, 300], needle_keys=2, num_needles=6)
    rows, *needles = module.test_dataloader()
    assert text_of(rows) == text_of(module.val_dataloader())
    assert [sum(len(batch["input_ids"]) for batch in loader) for loader in needles] == [6, 6]
    assert [next(iter(loader))["input_ids"].shape for loader in needles] == [(2, 100), (1, 300)]


def test_setup_reads_each_split_once(folder, monkeypatch):
    reads = []
    original = module_file.tokenize
    monkeypatch.setattr(module_file, "tokenize", lambda *args: reads.append(1) or original(*args))
    module = TextDataModule(path=str(folder), sequence_length=32)
    module.setup("validate")
    assert len(reads) == 1
    module.setup("fit")
    module.setup("test")
    module.setup("fit")
    assert len(reads) == 2


def test_processes_share_batches(folder):
    whole = data(folder, batch_size=4, val_batch_size=4)
    expected = [batch["input_ids"] for batch in whole.train_dataloader()]
    for mode in ("packed", "continuous"):
        shares = []
        for rank in range(2):
            module = data(folder, batch_size=2, val_batch_size=2, mode=mode)
            module.trainer = OneOfTwo(accelerator="cpu", logger=False)
            module.trainer.__class__ = type("Process", (OneOfTwo,), {"global_rank": rank})
            shares.append([list(loader) for loader in (module.train_dataloader(), module.val_dataloader())])
        train, val = ([*zip(*both, strict=True)] for both in zip(*shares, strict=True))
        if mode == "packed":
            merged = [torch.stack([a["input_ids"], b["input_ids"]], 1).flatten(0, 1) for a, b in train]
            assert all(map(torch.equal, merged, expected))
        predicted = sum((batch["shift_labels"] != -100).sum() for both in val for batch in both)
        assert predicted == len(whole.corpora["val"].tokens) - len(whole.corpora["val"])


class OneOfTwo(L.Trainer):
    """Trainer of one of two ranks, before its first batch."""

    world_size = 2
    global_rank = 0


def test_a_trainer_of_two_processes_keeps_our_sampler(folder, tmp_path):
    from lightning.pytorch.trainer.states import RunningStage

    connector = trainer(tmp_path)._data_connector
    connector.trainer._accelerator_connector.__class__ = type(
        "Distributed", (type(connector.trainer._accelerator_connector),), {"is_distributed": True}
    )
    loader = data(folder).train_dataloader()
    assert connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING) is loader


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1, not 0"),
        ({"val_sequence_length": 0}, "val_sequence_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1"),
        ({"needle_lengths": [100, 0]}, "needle_lengths must be at least 1"),
        ({"max_bytes": 1}, "max_bytes=1 is too small for any document"),
        ({"max_val_bytes": 1}, "max_val_bytes=1 is too small for any document"),
        ({"tokenizer": "/no/such/folder"}, "cannot load tokenizer='/no/such/folder'"),
        ({"pattern": "*.c"}, r"no file that matches pattern='\*\.c' \(it has 12 \.py\)"),
    ],
)
def test_bad_settings_are_refused_before_any_work(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data(folder, **options)


def test_too_little_text_for_a_batch(folder):
    with pytest.raises(ValueError, match=r"do not fill one batch of batch_size=4 rows of sequence_length=5000"):
        data(folder, sequence_length=5000).train_dataloader()
    with pytest.raises(ValueError, match="do not fill one batch"):
        data(folder, sequence_length=5000, mode="continuous").train_dataloader()


def test_needles_too_long_for_their_row(folder):
    with pytest.raises(ValueError, match="raise needle_lengths or lower needle_keys"):
        data(folder, needle_lengths=[60], needle_keys=3).test_dataloader()


def test_fit_validate_and_test(folder, tmp_path):
    class Tested(Recorder):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("loader", float(dataloader_idx), add_dataloader_idx=True)

    module, recorder = data(folder, needle_lengths=[100]), Tested()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(recorder, module)
    run.validate(recorder, module, verbose=False)
    results = run.test(recorder, module, verbose=False)
    assert len(recorder.seen) == len(module.train_dataloader())
    assert len(results) == 2
