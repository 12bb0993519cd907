"""lm-eval on exported models, in process and from its command line with only the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridmem.evaluate.harness import HarnessTask
from hybridmem.evaluate.lm_eval_tasks import documents
from hybridmem.evaluate.reader import Reader
from tests.hybridmem.models import FOLDERS

pytestmark = pytest.mark.filterwarnings("ignore")  # many warnings of lm-eval itself

TASKS = Path(__file__).with_name("lm_eval_tasks")
NAMES = ["local_choices", "local_rolling", "local_generation"]


def nats(model, ids: list[int]) -> torch.Tensor:
    """Return the loss in nats of each token except the first."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.fixture(scope="session")
def evaluated(exported):
    """Return the results by variant, evaluated in process with padded rows."""
    manager, found = TaskManager(include_path=str(TASKS), include_defaults=False), {}

    def evaluate(variant: str) -> dict:
        if variant not in found:
            model = HFLM(pretrained=str(exported(variant)), batch_size=4, max_length=64, device="cpu")
            found[variant] = simple_evaluate(model, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
        return found[variant]

    return evaluate


@pytest.mark.parametrize("variant", FOLDERS)
def test_in_process(variant, exported, evaluated):
    model = AutoModelForCausalLM.from_pretrained(exported(variant))
    tokenizer = AutoTokenizer.from_pretrained(exported(variant))
    samples = evaluated(variant)["samples"]
    for sample in samples["local_choices"]:
        prompt = sample["doc"]["context"]
        for choice, (logprob, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            expected = -nats(model, tokenizer(prompt + choice)["input_ids"])[-len(choice) :].sum().item()
            assert float(logprob) == pytest.approx(expected, abs=1e-3)

    bits = 0.0
    for sample in samples["local_rolling"]:
        text = [tokenizer.bos_token_id, *tokenizer(sample["doc"]["context"])["input_ids"]]
        bits += nats(model, text).sum().item() / torch.log(torch.tensor(2.0)).item()
    num_bytes = sum(len(sample["doc"]["context"]) for sample in samples["local_rolling"])
    measured = evaluated(variant)["results"]["local_rolling"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits / num_bytes, rel=1e-4)

    for sample in samples["local_generation"]:
        ids = tokenizer(sample["doc"]["context"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(out, skip_special_tokens=True).split(";")[0]


# One variant suffices: the command line only adds loading code from the folder, equal for all variants.
def test_from_the_command_line(exported, evaluated, tmp_path):
    options = f"pretrained={exported('mag')},trust_remote_code=True,max_length=64"
    model = ["--model", "hf", "--model_args", options, "--device", "cpu", "--batch_size", "4"]
    tasks = ["--include_path", TASKS, "--tasks", ",".join(NAMES)]
    command = [sys.executable, "-m", "lm_eval", *model, *tasks, "--output_path", tmp_path]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    for task, metric in zip(NAMES, ("acc", "bits_per_byte", "exact_match"), strict=True):
        expected = evaluated("mag")["results"][task][f"{metric},none"]
        assert results[task][f"{metric},none"] == pytest.approx(expected, rel=1e-5), task


def test_documents_are_as_long_as_asked(exported):
    folder = str(exported("mag"))
    rows = documents.ruler(["single", "variables"], pretrained=folder, max_seq_lengths=[512, 1024], num_samples=2)[
        "test"
    ]
    assert [row["length"] for row in rows] == [512, 512, 1024, 1024]
    for row in rows:
        assert len(f"{row['input']}\n{row['prefix']}".encode()) == row["length"]
        assert all(text in row["input"] for text in row["outputs"])
    with pytest.raises(ValueError, match="max_seq_lengths=500 is not a metric of this task"):
        documents.ruler(pretrained=folder, max_seq_lengths=[500])
    with pytest.raises(ValueError, match="metadata names no tokenizer"):
        documents.facts(max_seq_lengths=[512])


@pytest.mark.parametrize("task", ["facts", "needle", "loss_by_position"])
def test_tasks_of_hybridmem_eval(exported, task):
    folder = str(exported("mag"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cell = HarnessTask(f"hybridmem_{task}", 1024, folder, 2, 0).measure(Reader(model, tokenizer, 512, [258]))
    if task == "loss_by_position":
        assert 7 < cell["score"] < 10  # an untrained model of bytes
    else:
        assert cell["score"] == 0
        assert set(cell["results"][f"hybridmem_{task}"]) == {"1024"}


def test_tasks_that_cannot_be_loaded(exported, monkeypatch):
    def without_hub(*_: object, **__: object) -> None:
        raise ConnectionError("no hub")

    monkeypatch.setattr("datasets.load_dataset", without_hub)
    with pytest.raises(ValueError, match="lm-eval has no task 'hybridmem_no_such'"):
        HarnessTask("hybridmem_no_such", 1024, str(exported("mag")), 2, 0)
    with pytest.raises(ValueError, match="tasks=lm_eval/babilong_qa1: its data cannot be loaded \\(no hub\\)"):
        HarnessTask("babilong_qa1", 1024, str(exported("mag")), 2, 0)
