"""Run locks: active locks are respected, and stale locks are taken over."""

import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace

import pytest

from hybridmem.training import run_lock
from hybridmem.training.run_lock import EXPIRY, LockedError, hold
from tests.hybridmem.training.runs import hybridmem, write_config
from tests.several import forked, start


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "run.lock"


@pytest.fixture
def other(lock):
    """Start another process that holds the lock."""
    lock.parent.mkdir(exist_ok=True)
    held = multiprocessing.get_context("fork").Event()

    def work(rank):
        with hold(lock):
            held.set()
            time.sleep(600)

    [(process, _)] = start(1, work)
    assert held.wait(timeout=60)
    yield process
    process.kill()
    process.join()


def leave(lock, **changes):
    """Write the lock of this process's parent, which is running, with some fields changed."""
    parent = replace(run_lock._this_process(), pid=os.getppid(), started=run_lock._start_time(os.getppid()))
    lock.write_text(json.dumps(asdict(parent) | changes))


def test_a_live_process_keeps_its_lock_until_it_is_killed(lock, other):
    with pytest.raises(LockedError, match=f"is held by process {other.pid} on ") as refused:
        hold(lock).__enter__()
    assert (refused.value.path, refused.value.holder.pid) == (lock, other.pid)
    other.kill()
    while run_lock._start_time(other.pid):
        time.sleep(0.01)
    with hold(lock):  # held by a zombie process
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_lock_is_released_after_an_exception(lock, error):
    with pytest.raises(error), hold(lock):
        raise error
    assert not lock.exists()


def test_one_process_cannot_hold_a_lock_twice(lock):
    with hold(lock):
        with pytest.raises(LockedError):
            hold(lock).__enter__()
        assert lock.exists()
    with hold(lock):
        pass


def test_locks_acquired_before_a_refusal_are_released(lock, other, tmp_path):
    with pytest.raises(LockedError):
        hold(tmp_path / "free.lock", lock).__enter__()
    assert not (tmp_path / "free.lock").exists()
    assert lock.exists()


def test_a_pid_that_belongs_to_another_process_now_holds_nothing(lock):
    leave(lock)
    with pytest.raises(LockedError):
        hold(lock).__enter__()
    leave(lock, started="1 another-boot")
    with hold(lock):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"pid": 1}', "\0" * 40])
def test_a_damaged_file_holds_nothing(lock, content):
    lock.write_text(content)
    with hold(lock):
        pass
    assert not lock.exists()


@pytest.mark.parametrize("pid", [2**22 + 1, 10**30, -1, 0, "1"])
def test_a_pid_of_no_process_holds_nothing(lock, pid):
    leave(lock, pid=pid)
    with hold(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("place", [{"host": "another"}, {"namespace": "pid:[1]"}])
def test_a_lock_of_elsewhere_expires(lock, place):
    leave(lock, pid=2**22 + 1, **place)
    with pytest.raises(LockedError):
        hold(lock).__enter__()
    long_ago = time.time() - EXPIRY - 1
    os.utime(lock, (long_ago, long_ago))
    with hold(lock):
        pass


def test_a_process_whose_start_is_hidden_counts_while_its_file_is_touched(lock, monkeypatch):
    leave(lock)
    start_time = run_lock._start_time
    monkeypatch.setattr(run_lock, "_start_time", lambda pid: "" if pid == os.getppid() else start_time(pid))
    with pytest.raises(LockedError):
        hold(lock).__enter__()
    os.utime(lock, (0, 0))
    with hold(lock):
        pass


def test_a_holder_touches_its_file(lock, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.01)
    with hold(lock):
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 0


def test_a_folder_that_was_removed_is_no_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with hold(folder / "run.lock"):
        (folder / "run.lock").unlink()
        folder.rmdir()
    assert not folder.exists()


def test_of_many_processes_one_takes_over(lock):
    leave(lock, started="1 another-boot")

    def contend(rank):
        try:
            with hold(lock):
                time.sleep(1)
                return 1
        except LockedError:
            return 0

    assert sum(forked(4, contend)) == 1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
class TestFit:
    @pytest.fixture
    def lock(self, tmp_path):
        return tmp_path / "run" / "run.lock"

    def test_a_second_run_is_refused_in_one_line(self, tmp_path, other, monkeypatch, capsys):
        with pytest.raises(SystemExit) as stopped:
            hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path))
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"default_root_dir={tmp_path / 'run'} is in use by another run (process {other.pid} on " in error
        assert f"wait until it ends, stop it (kill {other.pid}), or choose another folder" in error

    def test_others_read_in_the_folder_of_a_run(self, tmp_path, lock, monkeypatch):
        config = write_config(tmp_path, trainer__max_steps=3)
        hybridmem(monkeypatch, "fit", "--config", config)
        assert not lock.exists()
        checkpoint = ["--ckpt_path", tmp_path / "run" / "step=3.ckpt"]
        with hold(lock):
            for command in ("validate", "test", "predict"):
                hybridmem(monkeypatch, command, "--config", config, *checkpoint)
            with pytest.raises(SystemExit):
                hybridmem(monkeypatch, "fit", "--config", config, *checkpoint)
        hybridmem(monkeypatch, "fit", "--config", config, *checkpoint, "--trainer.max_steps", 4)
        assert not lock.exists()

    def test_a_run_that_fails_leaves_no_lock(self, tmp_path, lock, monkeypatch):
        config = write_config(tmp_path, data__init_args__path="/nowhere")
        with pytest.raises(SystemExit):
            hybridmem(monkeypatch, "fit", "--config", config)
        assert lock.parent.is_dir()
        assert not lock.exists()
