"""Commands of the command line, called as by a user."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridmem.cli.main import named_folders
from tests.hybridmem.data.helpers import byte_level_bpe, gapped_tokenizer
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

PROGRAM = str(Path(sys.executable).with_name("hybridmem"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_fit_validate_test_predict_export_generate(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    hybridmem(monkeypatch, "fit", "--config", config)
    checkpoint = tmp_path / "run" / "step=6.ckpt"
    assert checkpoint.exists()
    losses = logged(tmp_path, "train/loss")
    assert len(losses) == 6
    validated = logged(tmp_path, "val/bits_per_byte")[0]  # the last checkpoint precedes the second validation
    assert losses[-1] < losses[0]
    assert logged(tmp_path, "train/tokens_per_second")
    for command in ("validate", "predict"):
        hybridmem(monkeypatch, command, "--config", config, "--ckpt_path", checkpoint)
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").open()]
    bits = sum(sum(row["bits"]) for row in rows) / sum(sum(token < 256 for token in row["tokens"]) for row in rows)
    assert bits == pytest.approx(logged(tmp_path, "val/bits_per_byte")[-1], rel=1e-4)
    needles = ["--data.init_args.needle_lengths", "[100,200]", "--data.init_args.num_needles", "2"]
    hybridmem(monkeypatch, "test", "--config", config, "--ckpt_path", checkpoint, *needles)
    assert logged(tmp_path, "test/bits_per_byte") == pytest.approx([bits], rel=1e-4)
    assert logged(tmp_path, "test/bits_per_byte_at/[0,8)")
    assert 0 <= logged(tmp_path, "test/needle_accuracy/200")[0] <= 1
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", checkpoint, "--output", exported)
    assert "weights" not in capsys.readouterr().err  # nor any other progress bar of transformers
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert torch.equal(model.lm_head.weight, weights(checkpoint)["model.lm_head.weight"])
    assert len(tokenizer) == 259
    texts = [file.read_text() for file in exported.iterdir() if file.suffix in (".json", ".md", ".py")]
    assert not any(str(part) in text for text in texts for part in (tmp_path, Path.home(), Path(__file__).parents[3]))
    card = (exported / "README.md").read_text()
    assert "| optimiser steps | 6 |" in card
    assert "| path | text |" in card
    assert f"| val/bits_per_byte | {validated:.4g} |" in card
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 258
    capsys.readouterr()
    for stream in ("true", "false"):
        options = ["--prompt", "value_1", "--max_new_tokens", 5, "--stream", stream, "--seed", 3]
        hybridmem(monkeypatch, "generate", "--model", exported, *options)
    streamed, whole = capsys.readouterr().out.strip().split("value_1")[1:]
    assert streamed.strip("\n") == whole.strip("\n")


@pytest.mark.parametrize("mode", ["packed", "continuous"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, mode):
    changes = dict(
        data__init_args__mode=mode,
        model__init_args__carry_state=mode == "continuous",
        model__init_args__config__attention_dropout=0.1,
        trainer__accumulate_grad_batches=2,
    )
    folders = tmp_path / "whole", tmp_path / "resumed"
    for folder in folders:
        folder.mkdir()
        config = write_config(folder, **changes)
        if folder.name == "whole":
            hybridmem(monkeypatch, "fit", "--config", config)
            continue
        hybridmem(monkeypatch, "fit", "--config", config, "--trainer.max_steps", 6, "--trainer.limit_train_batches", 6)
        first = folder / "run" / "step=3.ckpt"
        for later in (folder / "run").glob("step=[456].ckpt"):
            later.unlink()
        hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", first)
    whole, resumed = (weights(folder / "run" / "step=6.ckpt") for folder in folders)
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    assert logged(folders[0], "train/loss") == logged(folders[1], "train/loss")


@pytest.mark.parametrize(("interval", "kept"), [(4, ["previous", "step=4"]), (3, ["previous", "step=6"])])
def test_the_last_checkpoint_holds_the_end_of_training(tmp_path, monkeypatch, capsys, interval, kept):
    keeper = {"filename": "{step}", "save_last": True, "every_n_train_steps": interval}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper}
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, trainer__callbacks=[callback]))
    run = tmp_path / "run"
    assert sorted(path.stem for path in run.glob("*.ckpt")) == ["last", *kept]
    said = f"wrote {run}/last.ckpt; next: hybridmem export --ckpt_path {run}/last.ckpt --output my_model"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 6
    before = (run / "last.ckpt").stat().st_mtime_ns
    hybridmem(monkeypatch, "fit", "--config", tmp_path / "config.yaml", "--ckpt_path", run / "last.ckpt")
    assert (run / "last.ckpt").stat().st_mtime_ns == before


def test_the_last_checkpoint_holds_the_weights_beside_their_average(tmp_path, monkeypatch):
    keeper = {"filename": "{step}", "save_last": True, "every_n_train_steps": 4}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
        {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}},
    ]
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, trainer__callbacks=callbacks))
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    name = "model.lm_head.weight"
    assert not torch.equal(saved["current_model_state"][name], saved["state_dict"][name])


@pytest.mark.slow
def test_two_sharded_processes_train_and_export(tmp_path, monkeypatch):
    """FSDP2 on two CPU processes; the sharded checkpoint is then exported as a model."""
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    }
    config = write_config(
        tmp_path,
        trainer__strategy=strategy,
        trainer__devices=2,
        trainer__max_steps=3,
        trainer__precision="bf16-mixed",
        model__init_args__activation_checkpointing=True,
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fit = subprocess.run([PROGRAM, "fit", "--config", config], capture_output=True, text=True, env=environment)
    assert fit.returncode == 0, fit.stderr[-3000:]
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "step=3.ckpt", "--output", exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_interrupting_saves_and_says_how_to_go_on(tmp_path):
    config = write_config(tmp_path, trainer__max_steps=100_000, trainer__val_check_interval=100_000)
    arguments = [sys.executable, "-c", "from hybridmem.cli.main import main; main()", "fit", "--config", config]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("step=*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    saved = tmp_path / "run" / "interrupted.ckpt"
    assert saved.exists()
    assert f"--ckpt_path {saved}" in output
    assert "all saved. Resume with:" in output
    assert "Tip:" not in output
    assert "is not empty" not in output
    assert process.returncode == 128 + signal.SIGINT
    assert not (tmp_path / "run" / "run.lock").exists()
    assert torch.load(saved, weights_only=True)["global_step"] > 0


def test_a_missing_model_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "generate", "--model", tmp_path / "no_model", "--prompt", "a")
    assert "no_model does not exist; give a folder written by hybridmem export" in capsys.readouterr().err
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "generate", "--model", tmp_path / "last.ckpt", "--prompt", "a")
    assert "is a file; if it is a checkpoint, export it first: hybridmem export --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("show", "--model, --prompt are required (or --config FILE with the settings)"),
        ("compare", "--tasks is required (or --config FILE with the settings)"),
        ("fit", "--data, --model are required (or --config FILE with the settings)"),
        ("generate --max_new_tokens many", "max_new_tokens: Expected a int. Got value: many"),
    ],
)
def test_errors_name_options_as_a_user_writes_them(monkeypatch, capsys, command, message):
    with pytest.raises(SystemExit, match="2"):
        hybridmem(monkeypatch, *command.split())
    assert capsys.readouterr().err == f"hybridmem: error: {message}\n"


@pytest.mark.parametrize("command", ["show", "export", "fit"])
def test_help_has_no_reprs(monkeypatch, capsys, command):
    with pytest.raises(SystemExit, match="0"):
        hybridmem(monkeypatch, command, "--help")
    shown = capsys.readouterr().out
    assert command in shown.splitlines()[0]
    assert not re.search(r"<class|<function|object at 0x", shown)


@pytest.mark.parametrize(("length", "count"), [(8, 1), (9, 0)])
def test_rows_within_the_window_are_pointed_out_once(tmp_path, monkeypatch, recwarn, length, count):
    config = write_config(tmp_path, data__init_args__sequence_length=length, trainer__max_steps=3)
    hybridmem(monkeypatch, "fit", "--config", config)
    said = [str(warning.message) for warning in recwarn if "attention_window" in str(warning.message)]
    assert len(said) == count
    assert all("sequence_length=8 is within attention_window=8" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__init_args__config__variant="mag2"), "variant='mag2' is unknown; choose one of mac, mag"),
        (dict(model__init_args__config__num_key_value_heads=3), "num_attention_heads=2 must be a multiple of"),
        (dict(model__init_args__config__attention_window=0), "attention_window=0 must be at least 1"),
        (dict(model__init_args__config__vocab_size=100), "set model.init_args.config.vocab_size to 259"),
        (dict(model__init_args__carry_state=True), "data.init_args.mode is 'packed'; set it to continuous"),
        (dict(data__init_args__path="/nowhere/to/be/found"), "path='/nowhere/to/be/found' does not exist"),
        (dict(data__init_args__pattern="*.md"), "no file that matches pattern='*.md'"),
        (dict(data__init_args__tokenizer="/no/such/tokenizer"), "/no/such/tokenizer"),
        (dict(data__init_args__sequence_length=100_000), "lower one of them, or set path to more text"),
        (dict(model__init_args__config__attention_widow=8), "attention_widow' is not accepted"),
        (dict(model__init_args__attn_implementation="foo"), 'attn_implementation="foo"'),
        (
            dict(trainer__max_steps=2),
            "lower model.init_args.lr_scheduler.init_args.warmup_steps or raise trainer.max_steps",
        ),
        (dict(model__init_args__config__pad_token_id=259), "pad_token_id=259 is outside the vocabulary of 259 tokens"),
        (dict(trainer__default_root_dir=__file__), "is not writable; choose another folder"),
        (dict(ckpt_path="/no/such.ckpt"), "/no/such.ckpt"),
        (dict(trainer="\0"), "embedded null byte"),
        (dict(data__init_args__sequence_length=10**30), "sequence_length must be at most"),
        (dict(model__init_args__config__id2label={"a": "b"}), "id2label={'a': 'b'} must have numbers as keys"),
        (dict(model__init_args__config__dtype="a: b"), "dtype='a: b' is not a torch dtype"),
        (dict(model__init_args__optimizer__init_args__betas=[{}, 0.9]), "optimizer: Boolean value of Tensor"),
        (dict(model__init_args__config__num_hidden_layers=10**6), "num_hidden_layers=1000000 must be at most 10000"),
        (dict(trainer__overfit_batches=1e-30), "Try at least `overfit_batches="),
        (dict(data__init_args__batch_size=10**12), "batch_size must be at most 1048576"),
        (dict(data__init_args__num_workers=10**6), "num_workers must be at most 1024"),
        (dict(data__init_args__val_path="nan"), "val_path='nan' does not exist"),
        (dict(trainer__limit_train_batches=10**30), "trainer.limit_train_batches must be at most"),
        (dict(model={}), "model has no class; set model.class_path, for example to hybridmem.training.PretrainModule"),
        (dict(data={}), "data has no class; set data.class_path"),
        (dict(trainer=7), "trainer=7 must hold settings by name"),
        (dict(seed_everything=-1), "seed_everything: -1 is not in bounds"),
        (dict(model__init_args__carry_state=None), "model.init_args.carry_state=null must be of type bool"),
        (dict(model__init_args__optimizer__init_args__betas=[1.0, 0.9]), "optimizer: Invalid beta parameter"),
        (dict(trainer__max_time=""), "trainer.max_time: `Timer(duration='')` is not a valid duration"),
        (dict(trainer__val_check_interval={"a": 1}), "trainer.val_check_interval: "),
        (dict(trainer__max_steps=None), "trainer.max_steps=null must be of type int"),
        (dict(model__init_args__config__memory_conv_size=10**30), "memory_conv_size=1000"),
        (dict(trainer__check_val_every_n_epoch=0), "trainer.check_val_every_n_epoch must be at least 1"),
    ],
)
def test_impossible_settings_stop_before_training_with_one_line(tmp_path, monkeypatch, capsys, changes, message):
    config = write_config(tmp_path, **changes)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    error = capsys.readouterr().err
    assert stopped.value.code != 0
    last = error.strip().splitlines()[-1]
    assert last.startswith("hybridmem: error: ")
    assert message in last
    assert "Traceback" not in error
    assert "Namespace" not in error
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_fast_dev_run_is_no_shorter_than_the_warm_up(tmp_path, monkeypatch):
    config = write_config(tmp_path, model__init_args__lr_scheduler__init_args__warmup_steps=4)
    hybridmem(monkeypatch, "fit", "--config", config, "--trainer.fast_dev_run", "true")
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_barebones_trains_and_writes_nothing(tmp_path, monkeypatch):
    bare = dict(trainer__barebones=True, trainer__callbacks=[], trainer__log_every_n_steps=None)
    config = write_config(tmp_path, **bare)
    for command in ("fit", "predict"):
        checkpoint = ["--ckpt_path", tmp_path / "kept.ckpt"] if command == "predict" else []
        if checkpoint:
            keep = write_config(tmp_path, trainer__default_root_dir=str(tmp_path / "other"))
            hybridmem(monkeypatch, "fit", "--config", keep)
            (tmp_path / "other" / "step=6.ckpt").rename(tmp_path / "kept.ckpt")
            config = write_config(tmp_path, **bare)
        hybridmem(monkeypatch, command, "--config", config, *checkpoint)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "predictions.jsonl"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(), "remove log_every_n_steps=1, ModelCheckpoint from trainer, or set barebones to false"),
        (dict(trainer__logger=True, trainer__log_every_n_steps=0), "remove logger=True, ModelCheckpoint from"),
        (dict(trainer__callbacks=[], trainer__fast_dev_run=2), "remove log_every_n_steps=1, fast_dev_run=2 from"),
        (
            dict(
                trainer__callbacks=[{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
                trainer__log_every_n_steps=None,
                trainer__num_sanity_val_steps=2,
            ),
            "remove num_sanity_val_steps=2, LearningRateMonitor from trainer",
        ),
    ],
)
def test_barebones_names_all_that_it_leaves_out(tmp_path, monkeypatch, capsys, changes, named):
    config = write_config(tmp_path, trainer__barebones=True, **changes)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hybridmem: error: trainer.barebones=true disables checkpoints, logs and checks")
    assert named in last


def test_a_new_run_keeps_out_of_another_ones_folder(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    hybridmem(monkeypatch, "fit", "--config", config, "--trainer.max_steps", 3)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert "holds step=3.ckpt of an earlier run" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    hybridmem(monkeypatch, "fit", "--config", config, "--trainer.max_steps", 3)
    capsys.readouterr()
    wider = ["--model.init_args.config.hidden_size", 32]
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", tmp_path / "run" / "step=3.ckpt", *wider)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hybridmem: error: the checkpoint belongs to another model: hidden_size=16 (here 32)")


def test_text_that_is_not_utf8_needs_bytes(tmp_path, monkeypatch, capsys):
    byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    vocabulary = dict(data__init_args__tokenizer=str(tmp_path / "tokenizer"), model__init_args__config__vocab_size=2000)
    config = write_config(tmp_path, **vocabulary)
    (tmp_path / "text" / "bad.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    error = capsys.readouterr().err
    assert "bad.txt is not UTF-8" in error
    assert "set encoding_errors to 'replace'" in error


def test_a_vocabulary_with_gaps_needs_a_row_for_its_largest_id(tmp_path, monkeypatch, capsys):
    gapped_tokenizer(400).save_pretrained(tmp_path / "tokenizer")
    changes = dict(data__init_args__tokenizer=str(tmp_path / "tokenizer"), model__init_args__config__vocab_size=450)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the tokenizer's largest id is 450, but config.vocab_size=450" in error
    assert "set model.init_args.config.vocab_size to 451 or more" in error
    changes |= dict(model__init_args__config__vocab_size=451, data__init_args__sequence_length=8)
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "step=6.ckpt", "--output", exported)
    options = ["--prompt", "word1 word11", "--max_new_tokens", 3]
    hybridmem(monkeypatch, "generate", "--model", exported, *options)
    assert "word1" in capsys.readouterr().out
    gapped_tokenizer(500).save_pretrained(exported)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "generate", "--model", exported, *options)
    assert "tokenizer's largest id is 550, but the model's vocab_size is 451" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "names"), [("subnetwork", ["before", "after", "other"]), ("report", ["run_dir", "other"])]
)
def test_folders_need_no_names(command, names):
    named = [part for name in names for part in (f"--{name}", name.upper())]
    folders = [name.upper() for name in names]
    assert named_folders([command, *folders, "--rank", "true"]) == [command, *named, "--rank", "true"]
    assert named_folders([command, folders[0]]) == [command, *named[:2]]
    assert named_folders([command, *named]) == [command, *named]
    with pytest.raises(ValueError, match=f"{command} takes at most {len(names)} folders"):
        named_folders([command, *folders, "one more"])


def test_other_commands_are_left_as_they_are():
    assert named_folders(["compare", "a.yaml"]) == ["compare", "a.yaml"]


def test_print_config_and_help(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config, "--print_config")
    assert stopped.value.code == 0
    assert "memory_step: certified" in capsys.readouterr().out
    hybridmem(monkeypatch, "--help")
    assert "generate" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error():
    command = [PROGRAM, "compare", "--config", "configs/compare/full.yaml", "--list_runs", "true"]
    folder = Path(__file__).parents[3]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
