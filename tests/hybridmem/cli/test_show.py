"""`hybridmem show`, as a user calls it, and its page in a browser."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.cli.show import parse_layers, read_prompt, short_names
from hybridmem.data import byte_tokenizer
from hybridmem.evaluate.page import token_texts
from hybridmem.rl.attention.distributions import attention, memory
from hybridmem.rl.attention.recorder import AttentionRecorder
from tests.browser import browser_tab, find_browser
from tests.hybridmem.models import tiny_config
from tests.hybridmem.training.runs import hybridmem

TEXT = "def add(a, b):\n    return a + b  # naïve </script><b>\n"
PRECISION = 0.005  # of a weight that is stored as a byte


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with their tokenizers: two of ours, and one of transformers whose texts begin without a special token."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    heads = dict(variant="mah", head_sources=[["full", "memory"], ["none", "memory"]], num_sink_tokens=2)
    models = {
        "mag": HybridMemForCausalLM(tiny_config(vocab_size=259, variant="mag")),
        "mah": HybridMemForCausalLM(tiny_config(vocab_size=259, **heads)),
        "llama": LlamaForCausalLM(LlamaConfig(**shape)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer = byte_tokenizer()
        if name == "llama":
            tokenizer.bos_token = None
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    return path


def show(monkeypatch, model, prompt, output, *options):
    hybridmem(monkeypatch, "show", "--model", model, "--prompt", prompt, "--output", output, *options)
    return output.read_text()


def models_of(page):
    """Return the models in a page, with their arrays of bytes."""
    models = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    for model in models:
        model["bytes"] = np.frombuffer(zlib.decompress(base64.b64decode(model["numbers"])), np.uint8)
    return models


def bytes_of(model, part, *shape):
    return model["bytes"][part[0] : part[0] + part[1]].reshape(shape)


def weights_of(model, layer, kind):
    """Return the weights (heads, queries, keys) of the reads in a page."""
    reads = model["layers"][layer]["reads"][kind]
    shape = (len(reads["heads"]), len(model["tokens"]), reads["top"])
    low, high, roots = (bytes_of(model, reads[name], *shape).astype(int) for name in ("low", "high", "weights"))
    full = np.zeros((*shape[:2], shape[1]))
    np.add.at(full, (*np.indices(shape)[:2], low + 256 * high), (roots / 255) ** 2)
    return torch.tensor(full)


@pytest.mark.parametrize("name", ["mag", "llama"])
def test_the_page_agrees_with_the_recorder(folders, prompt, tmp_path, monkeypatch, capsys, name):
    page = show(monkeypatch, folders / name, prompt, tmp_path / "new" / "p.html", "--max_new_tokens", 5, "--top", 64)
    assert re.match(r"wrote .*p.html \([\d,]+ kB\)", capsys.readouterr().out)
    (found,) = models_of(page)
    assert found["name"] == name
    start = ["<|bos|>"] if name == "mag" else []
    given = [*start, *(bytes([byte]).decode(errors="backslashreplace") for byte in TEXT.encode())]
    assert found["prompt"] == len(given)
    assert found["tokens"][: len(given)] == given

    model = (HybridMemForCausalLM if name == "mag" else LlamaForCausalLM).from_pretrained(folders / name).eval()
    ids = torch.tensor([[256 + 1] * len(start) + list(TEXT.encode())])
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    count = ids.shape[1]
    assert len(found["tokens"]) == count
    with torch.no_grad(), AttentionRecorder(model, (0, 1)) as recorder:
        logits = model(ids).logits
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(found["nats"]), nats, atol=0.006, rtol=0)
    for layer in (0, 1):
        seen = weights_of(found, layer, "attention")[0].tril(-1)
        expected = attention(recorder.records[layer], count)[0].double()
        torch.testing.assert_close(seen / seen.sum(-1, keepdim=True).clamp(1e-9), expected, atol=0.02, rtol=0)
        if name == "mag":
            expected = memory(recorder.records[layer], count)[0].double()
            torch.testing.assert_close(weights_of(found, layer, "memory")[0], expected, atol=0.02, rtol=0)


def test_the_page_keeps_the_strongest_reads_and_loads_nothing(folders, prompt, tmp_path, monkeypatch):
    options = ("--max_new_tokens", 0, "--layers", "0")
    short = show(monkeypatch, folders / "mah", prompt, tmp_path / "a.html", "--top", 3, *options)
    whole = show(monkeypatch, folders / "mah", prompt, tmp_path / "b.html", "--top", 64, *options)
    assert len(short) < len(whole)
    (few,), (all_,) = models_of(short), models_of(whole)
    assert few["layers"][0]["sources"] == ["full", "full", "memory", "memory"]
    for kind in ("attention", "memory"):
        kept, full = weights_of(few, 0, kind), weights_of(all_, 0, kind)
        torch.testing.assert_close(kept.topk(3).values, full.topk(3).values)
        assert (kept > 0).sum(-1).max() == 3
    assert len(few["tokens"]) == few["prompt"]

    assert whole.count("</script>") == 2
    assert "<b>" not in whole
    shell = whole.replace(re.search(r'id="data">(.*?)</script>', whole, re.S)[1], "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", shell)
    assert re.findall(r'(?:src|href)="([^"]*)"', whole) == ["data:,"]
    assert "default-src 'none'" in whole


def test_two_models_of_different_kinds(folders, prompt, tmp_path, monkeypatch):
    options = ("--other", folders / "llama", "--max_new_tokens", 2)
    mag, llama = models_of(show(monkeypatch, folders / "mag", prompt, tmp_path / "p.html", *options))
    assert (mag["name"], llama["name"]) == ("mag", "llama")
    assert mag["tokens"][1 : mag["prompt"]] == llama["tokens"][: llama["prompt"]]
    assert list(llama["layers"][0]["reads"]) == ["attention"]
    assert list(mag["layers"][0]["reads"]) == ["attention", "memory"]


@pytest.mark.parametrize("name", ["mag", "mah", "llama"])
def test_a_prompt_of_one_token(folders, prompt, tmp_path, monkeypatch, name):
    prompt.write_text("a")
    page = show(monkeypatch, folders / name, prompt, tmp_path / "p.html", "--max_new_tokens", 0)
    (found,) = models_of(page)
    assert found["tokens"] == (["a"] if name == "llama" else ["<|bos|>", "a"])
    assert len(found["nats"]) == len(found["tokens"]) - 1
    assert weights_of(found, 0, "attention")[0, 0, 0] == 1 or name == "mag"  # persistent tokens take a share


@pytest.fixture(scope="module")
def flawed(folders, tmp_path_factory):
    """Inputs that the command refuses."""
    root = tmp_path_factory.mktemp("flawed")
    (root / "empty.txt").write_text("")
    (root / "bytes.txt").write_bytes(b"a\xff")
    small = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1, n_positions=20))
    for name in ("no_tokenizer", "gpt2"):
        small.save_pretrained(root / name)
    byte_tokenizer().save_pretrained(root / "gpt2")
    return root


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "nowhere.txt", "prompt=.*nowhere.txt is not a file; give a text file's path, or text with"),
        ("--prompt", "empty.txt", "prompt=.*empty.txt is empty; write at least one character"),
        ("--prompt", "bytes.txt", "prompt=.*bytes.txt is not UTF-8 text"),
        ("--model", "no_tokenizer", "model=.*no_tokenizer has no tokenizer"),
        ("--model", "gpt2", "has 20 positions, but prompt and max_new_tokens=64 need [0-9]+; shorten the prompt"),
        ("--model", "nowhere", "nowhere"),
        ("--other", "no_tokenizer", "no_tokenizer has no tokenizer"),
        ("--output", "gpt2", "output=.*gpt2 is a folder; name a file"),
        ("--layers", "5", r"layers=\[5\] must be indices into the model's 2 layers"),
        ("--layers", "first", "layers='first' must be all, or indices"),
        ("--top", "0", "top must be at least 1, not 0"),
        ("--max_new_tokens", "-1", "max_new_tokens must be at least 0, not -1"),
        ("--max_new_tokens", "70000", "need [0-9]+ tokens; at most 65536 fit"),
        ("--chat", "true", "has no chat template; remove chat"),
    ],
)
def test_errors_are_one_line(folders, flawed, prompt, tmp_path, monkeypatch, capsys, option, value, message):
    settings = {"--model": folders / "llama", "--prompt": prompt, "--output": tmp_path / "p.html"}
    value = flawed / value if option in (*settings, "--other") else value
    arguments = [part for pair in (settings | {option: value}).items() for part in pair]
    with pytest.raises(SystemExit, match="2"):
        hybridmem(monkeypatch, "show", *arguments)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "p.html").exists()


def test_a_prompt_is_text_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompt").write_text("from the file")
    assert read_prompt("my prompt") == ("my prompt", "from the file")
    assert read_prompt("my other prompt") == ("prompt", "my other prompt")
    assert read_prompt("def")[1] == "def"
    assert read_prompt("x. " * 2000)[1] == "x. " * 2000  # longer than a path may be
    for name in ("prompt.txt", "prompts/first"):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            read_prompt(name)
    with pytest.raises(ValueError, match="prompt is empty"):
        read_prompt("")


def test_layers_without_a_choice_are_spread_evenly():
    assert parse_layers(None, 30) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert parse_layers(None, 1) == [0]
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("0, -1", 3) == [0, -1]


def test_models_are_named_apart():
    assert short_names(["runs/a", "hub/b"]) == ["a", "b"]
    assert short_names(["runs/a/last.ckpt", "runs/b/last.ckpt"]) == ["runs/a/last.ckpt", "runs/b/last.ckpt"]


def test_texts_of_tokens():
    assert token_texts(byte_tokenizer(), [257, *"aï\n".encode(), 300]) == [
        "<|bos|>",
        "a",
        "\\xc3",
        "\\xaf",
        "\n",
        "<300>",
    ]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed, such as the package chromium")
    with browser_tab(path, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


WIDE = (
    "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - document.documentElement.clientWidth"
)
AT = "document.querySelector('.tokens').getAttribute('aria-activedescendant')"
DETAILS = "document.querySelector('.details').textContent"
LIT = """[...document.querySelectorAll('.tokens')].map(
  box => [...box.children].filter(span => span.style.getPropertyValue('--w')).length)"""
LABEL = """document.activeElement.getAttribute('aria-label')
  ?? document.activeElement.labels[0].firstChild.data"""
CENTRE = """(() => {
  document.querySelector('.tokens').scrollTop = 0;
  const box = document.getElementById('t0_4').getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()"""
CHOOSE = """((number, index) => {
  const select = document.querySelectorAll('select')[number];
  select.selectedIndex = index;
  select.dispatchEvent(new Event('change'));
})"""
CHOSEN = """[...document.querySelectorAll('section')].map(
  section => [...section.querySelectorAll('select')].map(select => select.value))"""


@pytest.mark.slow
def test_the_page_in_a_browser(folders, prompt, tmp_path, monkeypatch, tab):
    prompt.write_text(TEXT + "x" * 300 + "\n" * 30 + TEXT)
    show(monkeypatch, folders / "mah", prompt, tmp_path / "p.html", "--other", folders / "mag", "--max_new_tokens", 4)
    for width, dark in ((360, False), (360, True), (1280, True), (1280, False)):
        tab.open(tmp_path / "p.html", width, dark=dark)
        assert tab.evaluate(WIDE) <= 0
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        columns = tab.evaluate("new Set([...document.querySelectorAll('section')].map(s => s.offsetLeft)).size")
        assert columns == (2 if width > 900 else 1)

    # Tab reaches the selects of a panel, then its tokens; every control has a label.
    kinds = []
    for _ in range(10):
        tab.press("Tab")
        kinds.append(tab.evaluate(LABEL))
    own = ["Layer", "Reads of", "Head", "Strip"]
    assert kinds == [*own, "Tokens of mah", *own, "Tokens of mag"]
    tab.evaluate("document.querySelector('.tokens').focus()")
    tab.press("Home", "ArrowRight", "ArrowRight")
    assert tab.evaluate(AT) == "t0_2"
    assert "Token 2 e, surprise" in tab.evaluate(DETAILS)
    assert all(count > 0 for count in tab.evaluate(LIT))  # the second model has the same text
    tab.press("ArrowLeft")
    assert tab.evaluate(AT) == "t0_1"
    tab.press("Home", "ArrowDown", "ArrowUp")
    assert tab.evaluate(AT) == "t0_0"
    tab.press("End")
    assert tab.evaluate("document.querySelector('.tokens').scrollTop") > 0
    tab.press("Escape")
    assert tab.evaluate(DETAILS) == "No token is chosen."

    # The mouse shows a token, and a click keeps it.
    box = tab.evaluate(CENTRE)
    tab.point(*box)
    assert tab.evaluate(AT) == "t0_4"
    tab.click(*box)
    tab.point(2, 2)
    assert tab.evaluate(AT) == "t0_4"

    # Another layer and kind in one panel choose them in the other one, where they exist.
    for number in (0, 1, 2):  # layer, kind, head
        tab.evaluate(f"{CHOOSE}({number}, {max(1, number)})")
    tab.press("End")
    shown = tab.evaluate(CHOSEN)
    assert [each[1] for each in shown] == ["memory", "memory"]
    assert shown[0][0] == "1 (mah)"
    assert "Reads of memory" in tab.evaluate(DETAILS)
    assert tab.reported() == []
