"""Retrofits of tiny random models through the command line."""

import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridmem.convert import convert_folder
from hybridmem.data import TextDataModule, byte_tokenizer
from hybridmem.model.sequence import PADDING
from hybridmem.training import RetrofitModule
from hybridmem.training.checkpoints.contents import load_policy
from hybridmem.training.retrofit_losses import beyond_window
from tests.hybridmem.convert.bases import base_model
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config
from tests.several import as_processes, fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SPECIAL = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Write a tiny Llama with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    base_model("llama tied", dtype=torch.float32, vocab_size=259, **SPECIAL).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config(folder, base, **changes):
    """Write a configuration of a few steps on two kinds of data."""
    path = write_config(folder)
    settings = yaml.safe_load(path.read_text())
    text = settings["data"]["init_args"]
    task = {"class_path": "hybridmem.tasks.Recall", "init_args": {"num_pairs": 3, "window": 16}}
    parts = [
        {"class_path": "hybridmem.data.TextDataModule", "init_args": text | {"tokenizer": str(base)}},
        {
            "class_path": "hybridmem.data.TaskDataModule",
            "init_args": {"task": task, "tokenizer": str(base), "batch_size": 2, "num_train": 8, "num_val": 2},
        },
    ]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}}
    settings["model"] = {
        "class_path": "hybridmem.training.RetrofitModule",
        "init_args": {
            "base": str(base),
            "attention_window": 8,
            "num_sink_tokens": 2,
            "optimizer": optimizer,
            "lr_scheduler": {"class_path": "hybridmem.training.WarmupCosine", "init_args": {"warmup_steps": 2}},
        },
    }
    settings["data"] = {"class_path": "hybridmem.data.MixedDataModule", "init_args": {"parts": parts}}
    for key, value in changes.items():
        place = settings
        *names, last = key.split("__")
        for name in names:
            place = place[name]
        place[last] = value
    path.write_text(yaml.safe_dump(settings))
    return path


def ckpt(folder, step):
    return folder / "run" / f"step={step}.ckpt"


def memories(state):
    return {name: tensor for name, tensor in state.items() if ".memory." in name}


def test_regression(base, tmp_path, monkeypatch):
    hybridmem(monkeypatch, "fit", "--config", config(tmp_path, base), "--trainer.max_steps", 40)
    losses = logged(tmp_path, "train/loss")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    nats = {way: logged(tmp_path, f"val/nats/{way}") for way in ("full", "window", "hybrid")}
    assert len(set(nats["full"])) == len(set(nats["window"])) == 1
    assert logged(tmp_path, "val/recovered")[-1] == pytest.approx(
        (nats["window"][-1] - nats["hybrid"][-1]) / (nats["window"][-1] - nats["full"][-1]), abs=1e-4
    )
    before, after = weights(ckpt(tmp_path, 1)), weights(ckpt(tmp_path, 40))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert changed <= set(memories(before))

    hybridmem(monkeypatch, "export", "--ckpt_path", ckpt(tmp_path, 40), "--output", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.config.head_sources == [["memory"] * 4] * 2
    for name, tensor in memories(after).items():
        assert model.state_dict()[name.removeprefix("model.")].equal(tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").get_vocab() == byte_tokenizer().get_vocab()
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "retrofit, stage regression" in card
    assert f"base model | {base.name} |" in card


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_resume_is_exact(base, tmp_path, monkeypatch, precision):
    path = config(tmp_path, base, trainer__precision=precision)
    hybridmem(monkeypatch, "fit", "--config", path)
    whole = weights(ckpt(tmp_path, 6))
    assert {tensor.dtype for tensor in memories(whole).values()} == {torch.float32}
    base_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert whole["model.model.layers.0.mixer.q_proj.weight"].dtype == base_dtype
    for file in (ckpt(tmp_path, n) for n in (3, 4, 5, 6)):
        file.rename(file.with_suffix(".old"))
    hybridmem(monkeypatch, "fit", "--config", path, "--ckpt_path", ckpt(tmp_path, 2))
    resumed = weights(ckpt(tmp_path, 6))
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4}])
def test_kl_after_regression(base, tmp_path, monkeypatch, lora):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    hybridmem(monkeypatch, "fit", "--config", config(first, base))
    options = dict(model__init_args__stage="kl", model__init_args__lora=lora)
    path = config(second, ckpt(first, 6), **options)
    settings = yaml.safe_load(path.read_text())
    for part in settings["data"]["init_args"]["parts"]:
        part["init_args"]["tokenizer"] = str(base)
    path.write_text(yaml.safe_dump(settings))
    hybridmem(monkeypatch, "fit", "--config", path, "--trainer.max_steps", 30)
    assert all(loss > 0 for loss in logged(second, "train/loss"))
    assert kl_beyond(ckpt(second, 30), base, second) < kl_beyond(ckpt(second, 1), base, second)
    before, after = weights(ckpt(second, 1)), weights(ckpt(second, 30))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert all(".memory." in name or ".lora_" in name for name in changed)
    assert any(".lora_" in name for name in changed) == (lora is not None)
    hybridmem(monkeypatch, "export", "--ckpt_path", ckpt(second, 30), "--output", second / "exported")
    exported = AutoModelForCausalLM.from_pretrained(second / "exported")
    bare = AutoModelForCausalLM.from_pretrained(base)
    same = exported.model.layers[0].mixer.q_proj.weight.equal(bare.model.layers[0].self_attn.q_proj.weight)
    assert same == (lora is None)
    if lora is not None:
        with pytest.raises(ValueError, match="has adapters, so its full attention is no longer the base model's"):
            RetrofitModule(str(ckpt(second, 30)), "kl").configure_model()


@torch.no_grad()
def kl_beyond(checkpoint, base, folder):
    """Return the KL divergence from the base model on the training texts."""
    model, other = load_policy(str(checkpoint)).eval(), AutoModelForCausalLM.from_pretrained(base)
    texts = [(folder / "text" / f"{n}.txt").read_bytes()[:32] for n in range(12)]
    ids = torch.tensor([list(text) for text in texts])
    logs, wanted = (net(ids).logits[:, 10:].float().log_softmax(-1) for net in (model, other))
    return float((wanted.exp() * (wanted - logs)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["regression", "kl"])
def test_two_processes_train_together(base, tmp_path, stage):
    options = dict(trainer__strategy="ddp", trainer__devices=2, model__init_args__stage=stage)
    fit(2, "--config", config(tmp_path, base, **options))
    before, after = weights(ckpt(tmp_path, 1)), weights(ckpt(tmp_path, 6))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert changed <= set(memories(before))
    assert len(logged(tmp_path, "val/recovered")) == 2


def module_and_batch(base, tmp_path, **options):
    (tmp_path / "text").mkdir()
    for n in range(4):
        (tmp_path / "text" / f"{n}.txt").write_text(f"a line of the text {n} " * 20)
    data = TextDataModule(
        str(tmp_path / "text"), pattern="*.txt", tokenizer=str(base), sequence_length=64, batch_size=2, val_fraction=0.3
    )
    data.setup("fit")
    module = RetrofitModule(str(base), attention_window=8, num_sink_tokens=2, **options)
    module.check_data(data)
    return module, next(iter(data.val_dataloader()))


def loss_of(rank, module, batches):
    module.log = lambda *_, **__: None
    return module.training_step(batches[rank], 0).detach()


def test_the_kl_of_two_processes_is_the_mean_over_all_tokens(base, tmp_path):
    module, batch = module_and_batch(base, tmp_path, stage="kl")
    batch["document_ids"] = batch["document_ids"].clone()
    batch["document_ids"][1:, 20:] = PADDING  # the first row has more tokens beyond the window
    rows = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, None))]
    whole = loss_of(0, module, [batch])
    both = as_processes(2, loss_of, module, rows)
    assert torch.stack(both).mean() == pytest.approx(float(whole), rel=1e-5)
    alone = torch.stack([loss_of(rank, module, rows) for rank in range(2)])
    assert alone.mean() != pytest.approx(float(whole), rel=1e-3), "a mean of means is another number"


def validate(module, batch):
    found = {}
    module.log = lambda name, value, **_: found.update({name: float(value)})
    with torch.no_grad():
        module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    return found


def test_validation_numbers(base, tmp_path):
    module, batch = module_and_batch(base, tmp_path)
    found = validate(module, batch)
    counted = beyond_window(batch["document_ids"], 10) & (batch["shift_labels"] != -100)
    for way, source in (("full", "full"), ("window", "none"), ("hybrid", "memory")):
        with torch.no_grad(), module.causal.head_sources([[source] * 4] * 2):
            logits = module.causal(batch["input_ids"], document_ids=batch["document_ids"]).logits
        nats = torch.nn.functional.cross_entropy(logits[counted], batch["shift_labels"][counted])
        assert found[f"val/nats/{way}"] == pytest.approx(float(nats), rel=1e-5), way

    module.causal.set_head_sources([["full"] * 4] * 2)
    assert validate(module, batch)["val/recovered"] == 1
    module.causal.set_head_sources([["none"] * 4] * 2)
    assert validate(module, batch)["val/recovered"] == 0


def test_the_teacher_is_the_model_itself(base, tmp_path):
    module, batch = module_and_batch(base, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(base)
    names = {name for name, _ in module.model.named_parameters()}
    own = sum(p.numel() for name, p in module.model.named_parameters() if ".memory." not in name)
    assert own == sum(p.numel() for p in other.parameters()), "no second copy"
    assert {p.requires_grad for n, p in module.model.named_parameters() if ".memory." in n} == {True}
    assert len(names) > 0
    ids = batch["input_ids"][:1, :20]
    with torch.no_grad(), module.causal.head_sources([["full"] * 4] * 2):
        assert module.causal(ids).logits.equal(other(ids).logits)


def test_frozen_parameters_are_not_trained(base, tmp_path):
    module, _ = module_and_batch(base, tmp_path, frozen=["q_map.*", "k_map.*"])
    trained = {name.split(".memory.")[1] for name, p in module.model.named_parameters() if p.requires_grad}
    assert "q_map.weight" not in trained
    assert "gate_proj.weight" in trained


def test_a_converted_folder_keeps_its_window(base, tmp_path):
    convert_folder(base, tmp_path / "converted", attention_window=6, num_sink_tokens=1)
    module = RetrofitModule(str(tmp_path / "converted"), memory={"memory_depth": 2})
    module.configure_model()
    assert (module.config.attention_window, module.config.num_sink_tokens, module.reach) == (6, 1, 7)
    assert module.config.memory_depth == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__init_args__attention_window=300), "attention_window=300 is longer than the model's context of"),
        (dict(model__init_args__head_sources=[["memory"]]), "head_sources names 1 layers but num_hidden_layers=2"),
        (dict(model__init_args__head_sources="full"), "leave no memory to train"),
        (dict(model__init_args__frozen=["*"]), "frozen=['*'] leave no memory to train"),
        (dict(model__init_args__attention_window=40), "sequence_length=32 must exceed attention_window + num_sink"),
        (dict(model__init_args__lora={"r": 2}), "stage=regression freezes the base model"),
        (dict(trainer__accumulate_grad_batches=3), "trainer.accumulate_grad_batches=3 is not supported by Retrofit"),
        (dict(model__init_args__base="nowhere"), "model=nowhere is not a folder"),
        (dict(model__init_args__memory={"memory_width": 2}), "memory_width is not a memory setting of HybridMemConfig"),
        (dict(model__init_args__memory={"memory_depth": 0}), "memory_depth=0 must be at least 1"),
    ],
)
def test_errors_are_one_line(base, tmp_path, monkeypatch, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config(tmp_path, base, **changes))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(re.escape(message), last), last


def test_another_tokenizer_and_too_little_memory(base, tmp_path, monkeypatch, capsys):
    path = config(tmp_path, base)
    settings = yaml.safe_load(path.read_text())
    settings["data"] = settings["data"]["init_args"]["parts"][0]
    other = byte_tokenizer()
    other.add_tokens(["word"])
    other.save_pretrained(tmp_path / "other")
    for tokenizer, free, message in (
        (tmp_path / "other", None, "differs from the tokenizer of base="),
        (base, 1000, "stage=regression needs 0.0 GB of memory in addition to the model"),
    ):
        settings["data"]["init_args"]["tokenizer"] = str(tokenizer)
        path.write_text(yaml.safe_dump(settings))
        monkeypatch.setattr("hybridmem.training.retrofit.available_memory", lambda free=free: free)
        with pytest.raises(SystemExit):
            hybridmem(monkeypatch, "fit", "--config", path)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_models_checkpoint(base, tmp_path, monkeypatch, capsys):
    path = config(tmp_path, base)
    hybridmem(monkeypatch, "fit", "--config", path)
    changes = ["--model.init_args.attention_window", 9, "--trainer.max_steps", 8]
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", path, "--ckpt_path", ckpt(tmp_path, 6), *changes)
    assert "attention_window=8 (here 9)" in capsys.readouterr().err
