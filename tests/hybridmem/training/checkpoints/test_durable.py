"""Atomic, checksummed checkpoints that keep their predecessor and never execute code."""

import os
import resource
import signal

import pytest
import torch

from hybridmem.training import DurableCheckpointIO
from hybridmem.training.checkpoints.durable import newest_good, read_checkpoint, to_go_on_from
from hybridmem.training.errors import StoppedError
from tests.hybridmem.training.runs import Touch

FILES = DurableCheckpointIO()


def checkpoint(step):
    return {"step": step, "weight": torch.full((100, 100), float(step))}


def steps(folder):
    return {file.name: read_checkpoint(file)["step"] for file in folder.iterdir()}


def test_the_last_replaced_or_removed_file_is_kept(tmp_path):
    FILES.save_checkpoint(checkpoint(1), tmp_path / "deep" / "last.ckpt")
    folder = tmp_path / "deep"
    assert steps(folder) == {"last.ckpt": 1}
    FILES.save_checkpoint(checkpoint(2), folder / "last.ckpt")
    assert steps(folder) == {"last.ckpt": 2, "previous.ckpt": 1}
    FILES.save_checkpoint(checkpoint(3), folder / "step=3.ckpt")
    FILES.remove_checkpoint(folder / "step=3.ckpt")
    assert steps(folder) == {"last.ckpt": 2, "previous.ckpt": 3}


def test_an_old_file_does_not_take_the_place_of_a_newer_one(tmp_path):
    """The leftover of an old interruption must not replace a newer file."""
    FILES.save_checkpoint(checkpoint(1), tmp_path / "interrupted.ckpt")
    os.utime(tmp_path / "interrupted.ckpt", (1, 1))
    for step in (2, 3):
        FILES.save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    FILES.save_checkpoint(checkpoint(4), tmp_path / "interrupted.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 3, "interrupted.ckpt": 4, "previous.ckpt": 2}


def test_a_stopped_run_resumes_from_the_newer_of_two(tmp_path):
    assert to_go_on_from(tmp_path) is None
    for name, time in (("step=9.ckpt", 9), ("interrupted.ckpt", 2)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    assert to_go_on_from(tmp_path) == tmp_path / "interrupted.ckpt"
    (tmp_path / "last.ckpt").touch()
    assert to_go_on_from(tmp_path) == tmp_path / "last.ckpt"


def test_without_hard_links_it_is_kept_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        FILES.save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}
    FILES.remove_checkpoint(tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"previous.ckpt": 2}


def test_no_flipped_bit_passes(tmp_path):
    """This includes the archive's directory, where torch reads one flipped bit as an empty record."""
    file = tmp_path / "last.ckpt"
    FILES.save_checkpoint({"weight": torch.randn(8)}, file)
    data = file.read_bytes()
    expected = torch.load(file, weights_only=True)["weight"]
    assert torch.equal(read_checkpoint(file)["weight"], expected)
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            assert torch.equal(read_checkpoint(file)["weight"], expected)
        except ValueError:
            continue
        assert place > len(data) - 60  # in the digest itself


def test_a_file_of_another_writer_is_compared_with_its_records(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save(checkpoint(1), file)
    assert read_checkpoint(file)["step"] == 1
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert torch.load(file, weights_only=True)["step"] == 1  # torch alone accepts it
    with pytest.raises(ValueError, match=r"its record .* does not match its checksum"):
        read_checkpoint(file)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_broken_file_is_refused_with_a_good_one_named(tmp_path, damage):
    for step in (1, 2):
        FILES.save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    last = tmp_path / "last.ckpt"
    data = bytearray(last.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4  # in the weights, where torch alone would accept it
    last.write_bytes({"flipped": data, "truncated": data[: len(data) // 2], "emptied": b""}[damage])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read") as refused:
        FILES.load_checkpoint(last)
    assert f"resume with --ckpt_path {tmp_path / 'previous.ckpt'}" in str(refused.value)
    (tmp_path / "previous.ckpt").unlink()
    with pytest.raises(ValueError, match="cannot be read") as refused:
        FILES.load_checkpoint(last)
    assert "resume with" not in str(refused.value)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    FILES.save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(StoppedError, match=f"the disk of {tmp_path} has .* MiB left") as stopped:
            FILES.save_checkpoint(checkpoint(2), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(tmp_path / "last.ckpt") in str(stopped.value)
    assert steps(tmp_path) == {"last.ckpt": 1}


def test_a_missing_file_error_names_the_newest_good_one(tmp_path):
    FILES.save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"other\.ckpt does not exist; the newest intact checkpoint there is .*last\.ckpt"
    ):
        FILES.load_checkpoint(tmp_path / "other.ckpt")
    assert newest_good(tmp_path, but=tmp_path / "last.ckpt") is None


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    torch.save({"step": Touch(mark)}, tmp_path / "evil.ckpt")
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "UNRELATED"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read"):
            FILES.load_checkpoint(tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="weights_only=false"):
        FILES.load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not mark.exists()
