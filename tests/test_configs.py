"""All committed configurations parse, and those of large models take a step with a tiny model."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from hybridmem.data import byte_tokenizer
from hybridmem.training.checkpoints.contents import load_policy
from tests.hybridmem.convert.bases import base_model
from tests.hybridmem.data.vision_models import tiny_processor, write_vision_model
from tests.hybridmem.sandbox.isolation import needs_sandbox
from tests.hybridmem.training.runs import hybridmem, write_text

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GRIDS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
COMPLETE = [path for path in CONFIGS if path.parent.name not in ("overlays", "compare", "loggers")]
PRETRAINING = [path for path in COMPLETE if path.parent.name not in ("rl", "retrofit")]
RETROFITS = sorted((ROOT / "configs" / "retrofit").glob("*.yaml"))
WARM_UPS = sorted((ROOT / "configs" / "rl").glob("*_warmup.yaml"))
VISION = ROOT / "configs" / "rl" / "visual_search_qwen.yaml"
OVERLAYS = [path for path in CONFIGS if path.parent.name == "overlays"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TINY = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_window": 8,
    "memory_heads": 2,
    "memory_head_dim": 8,
    "memory_chunk_size": 8,
    "num_persistent_tokens": 2,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_starts_with_a_comment(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", COMPLETE, ids=lambda p: str(p.relative_to(ROOT)))
def test_parses(path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", path, "--print_config")
    assert stopped.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_grids_parse(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    hybridmem(monkeypatch, "compare", "--config", path, "--output", tmp_path, "--list_runs", "true")
    assert "start seed 0" in capsys.readouterr().out


def tiny_run(path: Path, folder: Path) -> list[str]:
    """Return options for a small run: a tiny model, short rows, little text and one to three steps."""
    config = yaml.safe_load(path.read_text())["model"]["init_args"]["config"]
    if "class_path" in config:  # a transformers model, which is small already
        options: dict[str, object] = (
            {"model.init_args.config.init_args.chunk_size": 8} if "Mamba" in str(config) else {}
        )
    else:
        options = {f"model.init_args.config.{name}": value for name, value in TINY.items()}
        if config.get("layer_types") is None:
            options["model.init_args.config.num_hidden_layers"] = 2
    options |= {
        "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.max_steps": 3,
        "trainer.val_check_interval": 3,
        "trainer.accumulate_grad_batches": 1,
        "trainer.default_root_dir": folder / "run",
        "data.init_args.sequence_length": 32,
        "data.init_args.val_sequence_length": 32,
        "data.init_args.batch_size": 2,
    }
    if "HubDataModule" in path.read_text():
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": f"line {n} of text, and more " * 9}) + "\n" for n in range(60)))
        options |= {
            "data.init_args.dataset": "json",
            "data.init_args.name": "null",
            "data.init_args.data_files": text,
            "data.init_args.tokenizer": "bytes",
            "data.init_args.val_documents": 5,
            "data.init_args.num_workers": 0,
        }
    else:
        options |= {"data.init_args.path": write_text(folder / "text"), "data.init_args.pattern": "*.txt"}
    return as_arguments(options)


def as_arguments(options: dict[str, object]) -> list[str]:
    """Convert settings to command line arguments."""
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: str(p.relative_to(ROOT)))
def test_takes_steps_with_a_tiny_model(path, tmp_path, monkeypatch):
    hybridmem(monkeypatch, "fit", "--config", path, *tiny_run(path, tmp_path))
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("path", RETROFITS, ids=lambda p: str(p.relative_to(ROOT)))
def test_retrofits_take_steps_with_a_tiny_model(path, tmp_path, monkeypatch):
    special = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
    base_model("llama tied", dtype=torch.float32, vocab_size=259, **special).save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ '\n' }}"
    tokenizer.save_pretrained(tmp_path / "base")
    settings = yaml.safe_load(path.read_text())
    settings["trainer"] |= dict(max_steps=3, val_check_interval=3, default_root_dir=str(tmp_path / "run"))
    settings["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 3
    module = settings["model"]["init_args"]
    module |= dict(base=str(tmp_path / "base"), attention_window=8)
    module["lr_scheduler"]["init_args"]["warmup_steps"] = 1
    text, task = (part["init_args"] for part in settings["data"]["init_args"]["parts"])
    text |= dict(tokenizer=module["base"], path=str(write_text(tmp_path / "text")), pattern="*.txt", sequence_length=32)
    text |= dict(val_fraction=0.2)
    task |= dict(tokenizer=module["base"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    hybridmem(monkeypatch, "fit", "--config", tmp_path / "config.yaml")
    assert (tmp_path / "run" / "step=3.ckpt").exists()


def goes_on_from(warm_up: Path) -> list[Path]:
    """Return the reinforcement learning configurations of the same task for a CPU."""
    stem = warm_up.stem.removesuffix("_warmup")
    found = [path for path in sorted(warm_up.parent.glob(f"{stem}*.yaml")) if path != warm_up]
    return [path for path in found if "accelerator: cpu" in path.read_text()]


def short_run(warm_up: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Return short options for the warm-up of a tiny model, and for the reinforcement learning that follows."""
    shape: dict[str, object] = {f"model.init_args.config.{name}": value for name, value in TINY.items()}
    shape["model.init_args.config.hidden_size"] = 64  # a patch of visual_search has 64 pixels
    if "tokenizer:" in warm_up.read_text():  # the tokenizer determines the vocabulary
        del shape["model.init_args.config.vocab_size"]
    short: dict[str, object] = {
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "data.init_args.batch_size": 2,
        "data.init_args.num_val": 4,
        "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
    }
    return shape | short, short | {
        "model.init_args.max_completion_length": 24
    }  # an untrained model never generates EOS


def learn_by_reward(warm_up: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, start: dict, later: dict) -> Path:
    """Run a short warm-up and the runs that continue it; return the folder of the last one."""
    monkeypatch.chdir(ROOT)
    options, by_reward = short_run(warm_up)
    run = folder / "start"
    hybridmem(
        monkeypatch, "fit", "--config", warm_up, *as_arguments(options | {"trainer.default_root_dir": run} | start)
    )
    assert goes_on_from(warm_up)
    for config in goes_on_from(warm_up):
        changes = {"trainer.default_root_dir": folder / config.stem, "model.init_args.model": run / "last.ckpt"}
        hybridmem(monkeypatch, "fit", "--config", config, *as_arguments(by_reward | changes | later))
        run = folder / config.stem
    return run


for_every_warm_up = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[needs_sandbox] * ("Repair" in path.read_text())) for path in WARM_UPS],
    ids=lambda p: str(p.relative_to(ROOT)),
)


@pytest.mark.slow
@for_every_warm_up
def test_reinforcement_learning_continues_its_warm_up(path, tmp_path, monkeypatch):
    run, exported = learn_by_reward(path, tmp_path, monkeypatch, {}, {}), tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", run / "last.ckpt", "--output", exported)
    assert (exported / "model.safetensors").exists()


BEGINS_WITH = {
    "retrofit/smollm2_kl": "fit --config {configs}/retrofit/smollm2.yaml",
    "rl/allocation": "convert --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/smollm2",
    "rl/identifier": "fit --config {configs}/rl/identifier_warmup.yaml",
    "rl/query": "fit --config {configs}/rl/query_warmup.yaml",
    "rl/recall": "fit --config {configs}/rl/recall_warmup.yaml",
    "rl/recall_critique": "fit --config {configs}/rl/recall_warmup.yaml",
    "rl/repair": "fit --config {configs}/rl/repair_warmup.yaml",
    "rl/token_router": "fit --config {configs}/rl/recall_warmup.yaml",
    "rl/two_formats": "fit --config {configs}/rl/two_formats_warmup.yaml",
    "rl/visual_search": "fit --config {configs}/rl/visual_search_warmup.yaml",
    "rl/workspace": "fit --config {configs}/rl/workspace_rft.yaml",
    "rl/workspace_rft": "fit --config {configs}/rl/workspace_warmup.yaml",
    "rl/workspace_stage2": "fit --config {configs}/rl/workspace.yaml",
    "rl/write_router": "fit --config {configs}/rl/recall_warmup.yaml",
}
STARTS = re.compile(r"^ +(model|base|init_from): runs/", re.M)


def test_every_configuration_with_a_start_is_listed():
    starting = [path for path in COMPLETE if STARTS.search(path.read_text())]
    assert [str(path.relative_to(ROOT / "configs").with_suffix("")) for path in starting] == sorted(BEGINS_WITH)


@pytest.mark.parametrize("name", BEGINS_WITH)
def test_a_missing_start_names_the_command_that_creates_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", ROOT / "configs" / f"{name}.yaml")
    assert stopped.value.code == 2
    command = BEGINS_WITH[name].format(configs=ROOT / "configs")
    assert f"does not exist; create it first: hybridmem {command}\n" in capsys.readouterr().err


def test_a_grid_names_the_command_that_creates_a_missing_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    grid = ROOT / "configs" / "compare" / "distillation.yaml"
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "compare", "--config", grid, "--output", tmp_path)
    assert stopped.value.code == 2
    assert "create it first: hybridmem fit --config configs/rl/teacher.yaml\n" in capsys.readouterr().err


def test_a_vision_language_model_learns_by_reward(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridmem.data.task_module.load_processor", tiny_processor)
    small = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 1,
        "trainer.callbacks.init_args.every_n_train_steps": 2,
        "trainer.default_root_dir": tmp_path / "run",
        "model.init_args.model": write_vision_model(tmp_path / "model"),
        "model.init_args.max_completion_length": 4,
        "model.init_args.reward_funcs": "[tests.hybridmem.data.vision_models.different_tokens]",
        "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
        "data.init_args.task.init_args.grid": 2,
        "data.init_args.batch_size": 2,
        "data.init_args.num_val": 4,
    }
    hybridmem(monkeypatch, "fit", "--config", VISION, *as_arguments(small))
    trained = load_policy(str(tmp_path / "run" / "last.ckpt")).state_dict()
    start = load_policy(str(tmp_path / "model")).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed
    assert all("language_model" in name for name in changed)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: str(p.relative_to(ROOT)))
def test_overlays_go_on_top_and_export(path, tmp_path, monkeypatch):
    below = ROOT / "configs" / "quickstart.yaml"
    hybridmem(monkeypatch, "fit", "--config", below, "--config", path, *tiny_run(below, tmp_path))
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "last.ckpt", "--output", exported)
    assert (exported / "model.safetensors").exists()
