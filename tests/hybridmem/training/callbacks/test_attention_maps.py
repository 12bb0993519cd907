"""Attention maps as images, labelled with the text if there is room."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridmem.rl import AttentionRecorder
from hybridmem.rl.attention.distributions import allocation, attention, memory
from hybridmem.training import AttentionMaps
from hybridmem.training.callbacks.attention_maps import LABELLED, attention_maps, draw, shares
from hybridmem.training.callbacks.policy_probe import token_label
from tests.hybridmem.models import tiny_model, tokens
from tests.hybridmem.training.policy.test_module import write_config
from tests.hybridmem.training.runs import hybridmem, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
MAPS = {"class_path": "hybridmem.training.AttentionMaps", "init_args": {"every_n_steps": 4, "layers": [0, -1]}}


def record(**changes):
    model = tiny_model(torch.float32, **changes)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(tokens(batch=1, time=20), use_cache=False)
    return recorder.records[1]


def test_a_run_draws_before_and_during_training(tmp_path, monkeypatch):
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2},
    }
    config = write_config(tmp_path, trainer__callbacks=[MAPS, checkpoints])
    hybridmem(monkeypatch, "fit", "--config", config)
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    board = EventAccumulator(str(folder)).Reload()
    for layer in (0, 1):
        events = board.Images(f"attention_maps/layer_{layer}")
        assert [event.step for event in events] == [0, 4]
        assert events[0].encoded_image_string != events[1].encoded_image_string
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path), "--trainer.default_root_dir", tmp_path / "unseen")
    watched, alone = weights(tmp_path / "run" / "step=6.ckpt"), weights(tmp_path / "unseen" / "step=6.ckpt")
    assert all(torch.equal(watched[name], alone[name]) for name in watched)


def test_maps_show_the_layers_distributions():
    found = record(variant="mag")
    maps = attention_maps(found, 6)
    assert list(maps) == ["attention", "memory"]
    torch.testing.assert_close(maps["attention"], attention(found, 6)[0])
    torch.testing.assert_close(maps["memory"], memory(found, 6)[0])
    assert list(attention_maps(record(variant="swa"), 6)) == ["attention"]
    assert list(attention_maps(record(variant="lmm"), 6)) == ["memory"]
    assert list(attention_maps(record(variant="mag", memory_depth=2), 6)) == ["attention"]
    with pytest.raises(ValueError, match="choose other layers"):
        attention_maps(record(variant="lmm", memory_depth=2), 6)


def test_the_picture_holds_the_distribution_and_the_text():
    values = torch.eye(3, 8)
    labels = [token_label(text) for text in ["a", " ", "\n", "é", "$", "$$", "\ufffd", "|"]]
    figure = draw({"attention": values, "memory": values}, labels)
    first = figure.axes[0]
    assert torch.equal(torch.tensor(first.images[0].get_array().data), values)
    assert [text.get_text() for text in first.get_xticklabels()] == ["a", "·", "\\n", "\\xe9", "$", "$$", "\ufffd", "|"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["$$", "\ufffd", "|"]
    assert {axes.get_title() for axes in figure.axes} >= {"attention", "memory"}
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("variant", "ways"), [("mag", ["memory", "window"]), ("mac", ["persistent", "memory", "window"])]
)
def test_allocations_are_drawn_below_the_maps(variant, ways):
    found = record(variant=variant)
    expected = allocation(found, 6)[0]
    torch.testing.assert_close(shares(found, 6), expected)
    figure = draw(attention_maps(found, 6), ["x"] * 20, shares(found, 6))
    below = next(axes for axes in figure.axes if axes.get_title() == "allocation")
    assert [text.get_text() for text in below.get_legend().get_texts()] == ways
    tops = below.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert tops == pytest.approx(1.0)
    assert shares(record(variant="swa"), 6) is None


def test_a_long_text_is_numbered():
    keys = LABELLED + 1
    figure = draw({"attention": torch.eye(2, keys)}, ["x"] * keys)
    figure.canvas.draw()
    assert "x" not in {text.get_text() for text in figure.axes[0].get_xticklabels()}
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["x", "x"]


@pytest.mark.parametrize("settings", [dict(every_n_steps=0), dict(example=-1)])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AttentionMaps(**settings)
