"""Uploads to a local server that answers like the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from hybridmem.cli import hub
from tests.hybridmem.training.runs import hybridmem, write_config

NAME = "me/my_model"


class Hub:
    """A hub that keeps the files of every commit; `refusal` is the status of its answers, 200 to accept."""

    def __init__(self, refusal: int = 200):
        self.refusal, self.tokens, self.created, self.files, self.address = refusal, set(), [], {}, ""

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/{NAME}"}
        if path == f"/api/models/{NAME}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if path == f"/api/models/{NAME}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return {"commitUrl": f"{self.address}/{NAME}/commit/0", "commitOid": "0"}
        assert path == "/api/validate-yaml", path
        return {}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Run the server; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            content = json.dumps(hub.answer(self.path, body) if hub.refusal == 200 else {"error": "no"}).encode()
            self.send_response(hub.refusal)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def online(monkeypatch):
    """Let the hub's client use the network, with a token; return a function that sets its address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


def write_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hybridmem(monkeypatch, "fit", "--config", write_config(folder))
    return folder / "run" / "step=6.ckpt"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_export_is_uploaded_with_its_model_card(tmp_path, monkeypatch, capsys, online):
    checkpoint, output = write_checkpoint(tmp_path, monkeypatch), tmp_path / "exported"
    theirs = Hub()
    with serving(theirs) as address:
        online(address)
        hybridmem(monkeypatch, "export", "--ckpt_path", checkpoint, "--output", output, "--push_to_hub", NAME)
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded {address}/{NAME}/commit/0"
    assert [(repo["name"], repo["organization"]) for repo in theirs.created] == [("my_model", "me")]
    assert theirs.tokens == {"Bearer hf_mine"}
    assert theirs.files == {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }
    card = theirs.files["README.md"].decode()
    assert f'from_pretrained("{NAME}")' in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert len(theirs.files["model.safetensors"]) > 1000


def test_a_missing_token_is_an_error_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "export", "--ckpt_path", "no.ckpt", "--output", tmp_path / "out", "--push_to_hub", NAME)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"push_to_hub={NAME} needs a Hugging Face token; run hf auth login, or set HF_TOKEN")


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "run hf auth login again"), (403, "use a token with write access to that name")]
)
def test_a_refusal_names_the_remedy(online, status, remedy):
    with serving(Hub(status)) as address:
        online(address)
        with pytest.raises(ValueError, match=f"the hub refuses .*; {remedy}"):
            hub.open_repository(NAME)


def test_a_hub_out_of_reach(online):
    with serving(Hub()) as address:
        online(address)
    with pytest.raises(OSError, match=rf"cannot reach {address}"):
        hub.open_repository(NAME)


def test_names_that_the_hub_does_not_accept(online):
    online("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="push_to_hub=a/b/c is not a model name"):
        hub.open_repository("a/b/c")
