"""The script that builds a pretrained model's folder: one-line errors, and no repeated work."""

import importlib
import json
import subprocess
import sys

import pytest

from tests.unchecked import ROOT


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("get_smollm2")
    monkeypatch.setattr(sys, "argv", ["get_smollm2", str(tmp_path / "model")])
    return module


def error_of(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ERROR: Could not find a version\nERROR: No matching distribution found", "cannot reach a package index"),
        ("WARNING: Retrying\nERROR: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: something else", "pip download failed: ERROR: something else"),
    ],
)
def test_downloads_that_fail(script, monkeypatch, capsys, tmp_path, said, message):
    failed = subprocess.CompletedProcess([], 1, stderr=said)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    assert message in error_of(script, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download(script, monkeypatch, capsys, tmp_path):
    def fetch(place):
        (place / "a.whl").write_text("broken")
        return place / "a.whl"

    monkeypatch.setattr(script, "fetch", fetch)
    assert "a.whl has the checksum" in error_of(script, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_folder_in_use(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: type("", (), dict(free=10**6)))
    assert "needs 600 MB of free disk space" in error_of(script, capsys)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    assert "has other contents" in error_of(script, capsys)


def test_a_complete_folder_is_left_alone(script, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    record = dict(wheel=script.WHEEL_SHA256, weights=script.sha256(folder / "model.safetensors"))
    (folder / script.RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(script, "build", None)
    script.main()
    assert "is complete" in capsys.readouterr().out
    (folder / "model.safetensors").write_text("other weights")
    assert not script.is_complete(folder)
