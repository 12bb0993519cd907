"""Sharded checkpoints detect flipped bytes and missing files and never execute code."""

import pickle
import shutil
import subprocess

import pytest
import torch

from hybridmem.training.checkpoints.sharded import check_shards, is_sharded, put_in_place, seal
from tests.hybridmem.training.runs import Touch

FILES = ["__0_0.distcp", ".metadata", "meta.pt"]


@pytest.fixture
def folder(tmp_path):
    """Write the checkpoint of a sharded run with one process."""
    place = tmp_path / "step=3.ckpt"
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch.distributed.checkpoint.save({"a": torch.randn(300), "n": 1}, checkpoint_id=place, no_dist=True)
    torch.save({"global_step": 3}, place / "meta.pt")
    return place


def test_folders_are_taken_sealed_or_not(folder):
    check_shards(folder)
    seal(folder, 0)
    check_shards(folder)
    assert is_sharded(folder)
    assert not is_sharded(folder.parent)


@pytest.mark.skipif(shutil.which("b2sum") is None, reason="needs coreutils")
def test_a_shell_can_check_the_seals(folder):
    seal(folder, 0)
    check = ["b2sum", "--length", "128", "--check", "0.b2"]
    said = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert said.count("OK") == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_or_went_is_found(folder, name):
    seal(folder, 0)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(ValueError, match=f"file {name} does not match its checksum"):
        check_shards(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"file {name} does not match its checksum"):
        check_shards(folder)


def test_the_replaced_checkpoint_is_kept(folder):
    """This applies to folders, and to files of runs without sharding."""
    place, previous = folder.with_name("last.ckpt"), folder.with_name("previous.ckpt")
    place.write_text("first")
    for expected in ("file", "folder", "folder"):
        part = folder.with_name("checkpoint.part")
        shutil.copytree(folder, part)
        put_in_place(part, place)
        assert is_sharded(place)
        assert previous.is_file() == (expected == "file")
        assert is_sharded(previous) == (expected == "folder")
        assert not part.exists()


def test_processes_share_the_work(folder):
    seal(folder, 0)
    (folder / "__0_0.distcp").write_bytes(b"")
    refused = []
    for rank in range(len(FILES)):
        try:
            check_shards(folder, rank, len(FILES))
        except ValueError:
            refused.append(rank)
    assert len(refused) == 1


def test_nothing_in_a_description_is_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(ValueError, match="which unpickling would execute"):
        check_shards(folder)
    assert not mark.exists()
