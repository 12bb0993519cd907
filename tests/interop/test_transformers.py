"""transformers' Trainer, pipeline, streamers and generation modes on exported models."""

import os
import subprocess
import sys
from threading import Thread

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    StoppingCriteria,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.hybridmem.models import FOLDERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXT = "the quick brown fox"


@pytest.fixture(params=FOLDERS)
def folder(request, exported):
    return exported(request.param)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_trainer(model, tokenizer, tmp_path):
    """The run has padded rows of different lengths and evaluation, and resumes to the same weights."""
    data = Dataset.from_list([dict(tokenizer(f"{n} {n * n}\n" * (2 + n))) for n in range(8)])
    settings = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, settings, collator, data, data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    resumed = Trainer(loaded, settings, collator, data, data, processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_pipeline(model, tokenizer, folder):
    """Prompts of different lengths give the same text in a batch and alone."""
    writer = pipeline("text-generation", model=str(folder), device="cpu")
    prompts, settings = [TEXT, TEXT[:7]], dict(max_new_tokens=5, do_sample=False)
    together = [rows[0]["generated_text"] for rows in writer(prompts, batch_size=2, **settings)]
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        assert text == tokenizer.decode(model.generate(**ids, **settings)[0], skip_special_tokens=True)


def test_streamer(model, tokenizer):
    inputs, settings = tokenizer(TEXT, return_tensors="pt"), dict(max_new_tokens=8, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    writing = Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, **settings))
    writing.start()
    pieces = list(streamer)
    writing.join()
    whole = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)


class Twice(StoppingCriteria):
    """Stopping criterion that ends after a repeated token."""

    def __call__(self, input_ids, scores, **_):
        return torch.tensor([row[-1] in row[:-1] for row in input_ids])


def test_beams_samples_and_stopping(model, tokenizer):
    inputs = tokenizer(TEXT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert torch.equal(
        beams, model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=4, use_cache=False)
    )
    torch.manual_seed(0)
    drawn = model.generate(**inputs, do_sample=True, top_p=0.9, num_return_sequences=3, max_new_tokens=4)
    torch.manual_seed(0)
    again = model.generate(
        **inputs, do_sample=True, top_p=0.9, num_return_sequences=3, max_new_tokens=4, use_cache=False
    )
    assert torch.equal(drawn, again)
    stopped = model.generate(**inputs, max_new_tokens=12, do_sample=False, stopping_criteria=[Twice()])
    greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    row = greedy[0].tolist()
    ends = [at for at in range(length, len(row)) if row[at] in row[:at]]
    assert stopped[0].tolist() == row[: ends[0] + 1 if ends else None]


# One variant suffices, because a flag of the class causes the error.
@pytest.mark.parametrize("folder", ["full"], indirect=True)
def test_assisted_generation_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(**tokenizer(TEXT, return_tensors="pt"), assistant_model=model, max_new_tokens=3)


def in_a_clean_process(code: str, modules: os.PathLike) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


# One variant suffices, because all share the code, and a process takes seconds.
@pytest.mark.parametrize("folder", ["mag"], indirect=True)
def test_the_folder_brings_its_own_code(model, folder, tmp_path):
    """A process that never imports hybridmem runs the folder's copy of the model with the installed operators."""
    code = f"""
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
backbone = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert "hybridmem" not in sys.modules
ids = torch.arange(32, 64)[None]
assert torch.equal(model.model(ids).last_hidden_state, backbone(ids).last_hidden_state)
print(model(ids).logits.sum().item(), model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
"""
    run = in_a_clean_process(code, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    ids = torch.arange(32, 64)[None]
    total, generated = run.stdout.strip().split(maxsplit=1)
    assert float(total) == pytest.approx(model(ids).logits.sum().item(), rel=1e-4)
    assert generated == str(model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:].tolist())


def test_missing_package_error_names_the_remedy(exported, tmp_path):
    code = f"""
import sys
sys.modules["hybridmem_kernels"] = None
from transformers import AutoConfig
AutoConfig.from_pretrained({str(exported("mag"))!r}, trust_remote_code=True)  # what every Auto class loads first
"""
    run = in_a_clean_process(code, tmp_path)
    assert run.returncode != 0
    assert "pip install hybridmem" in run.stderr.strip().splitlines()[-1]
