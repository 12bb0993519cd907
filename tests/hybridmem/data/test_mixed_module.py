import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hybridmem.data import MixedDataModule, TaskDataModule, TextDataModule
from hybridmem.tasks import Recall

from .helpers import LIGHTNING_WARNINGS, Recorder, byte_level_bpe, trainer, write_files

pytestmark = LIGHTNING_WARNINGS
STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def mixture(folder, shares=(1.0, 3.0), seed=0, num_train=12, tokenizer="bytes", **text) -> MixedDataModule:
    """Return a mixture of text and a task with short epochs."""
    settings = dict(path=str(folder), sequence_length=100, batch_size=8, val_fraction=0.2, tokenizer=tokenizer)
    parts = [TextDataModule(**settings | text), TaskDataModule(Recall(), batch_size=2, num_train=num_train, num_val=4)]
    return MixedDataModule(parts, None if shares is None else list(shares), seed)


class AnyRecorder(Recorder):
    """Recorder of the input_ids of batches of any kind."""

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 1.0


def train(folder, tmp_path, max_steps, ckpt_path=None, callbacks=(), **options):
    recorder = AnyRecorder()
    run = trainer(tmp_path, max_steps=max_steps, limit_val_batches=0, callbacks=list(callbacks))
    run.fit(recorder, mixture(folder, **options), ckpt_path=ckpt_path)
    return recorder.seen


def test_batches_are_those_of_the_parts(folder, tmp_path):
    data = mixture(folder)
    seen = train(folder, tmp_path, STEPS)
    turns = [part for part, _ in zip(data.turns(0), range(STEPS), strict=False)]
    assert data.counts(STEPS) == [turns.count(0), turns.count(1)]
    for part in (0, 1):
        plain = mixture(folder).parts[part]
        del plain.count_batches
        recorder = AnyRecorder()
        run = trainer(tmp_path / str(part), max_steps=turns.count(part), limit_val_batches=0)
        run.fit(recorder, plain)
        own = [batch for batch, turn in zip(seen, turns, strict=True) if turn == part]
        assert own == recorder.seen, part  # also beyond the end of the task's epoch
    assert turns.count(1) * 2 > 12


@pytest.mark.parametrize("stop", [1, 5, 9, 13])
def test_resumes_with_the_next_batch(folder, tmp_path, stop):
    everything = train(folder, tmp_path / "all", STEPS)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(folder, tmp_path / "first", stop, callbacks=[saver])
    path = tmp_path / "saved" / f"step={stop}.ckpt"
    assert train(folder, tmp_path / "second", STEPS, path) == everything[stop:]


def test_shares_and_seed(folder):
    data = mixture(folder)
    assert abs(data.counts(4000)[0] / 1000 - 1) < 0.1
    assert mixture(folder, None).chances.tolist() == [0.5, 0.5]
    assert mixture(folder, (0, 1)).counts(50) == [0, 50]
    orders = [[turn for turn, _ in zip(mixture(folder, seed=n).turns(0), range(40), strict=False)] for n in (0, 1)]
    assert orders[0] != orders[1]
    later = [turn for turn, _ in zip(data.turns(7), range(33), strict=False)]
    assert later == orders[0][7:]


def test_validation_is_the_first_part(folder):
    data, text = mixture(folder), mixture(folder).parts[0]
    data.setup("fit")
    text.setup("fit")
    assert data.vocab_size == 259
    for ours, theirs in zip(data.val_dataloader(), text.val_dataloader(), strict=True):
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="parts is empty"):
        MixedDataModule([])
    for shares in ((1.0,), (-1.0, 2.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="must be one non-negative number per part, 2 in all"):
            mixture(folder, shares)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=1)
    train(folder, tmp_path, 2, callbacks=[saver])
    with pytest.raises(ValueError, match="the checkpoint has the mixture"):
        train(folder, tmp_path, 4, tmp_path / "saved" / "step=2.ckpt", seed=1)
    with pytest.raises(ValueError, match="a mixture is endless"):
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(AnyRecorder(), mixture(folder))


def test_parts_with_different_tokenizers(folder, tmp_path):
    byte_level_bpe().save_pretrained(tmp_path / "bpe")
    with pytest.raises(ValueError, match=r"parts\[1\] has tokenizer='bytes', but parts\[0\]"):
        mixture(folder, tokenizer=str(tmp_path / "bpe")).setup("fit")
