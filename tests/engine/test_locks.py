"""A run folder belongs to one process at a time."""

import os
import signal
import subprocess
import sys

import pytest

from widekernel.engine import RunFolder, RunFolderError, locks

pytest.importorskip("fcntl")

TRY = """
import pathlib, runpy, sys
with runpy.run_path(sys.argv[1])["exclusive"](pathlib.Path(sys.argv[2])):
    print("held")
"""

WORKER = """
import os, pathlib, runpy, sys, time
with runpy.run_path(sys.argv[1])["exclusive"](pathlib.Path(sys.argv[2])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(100)
"""


def command(script, folder):
    return [sys.executable, "-c", script, locks.__file__, str(folder / ".lock")]  # without importing torch


def try_elsewhere(folder):
    return subprocess.run(command(TRY, folder), capture_output=True, text=True, timeout=60)


def test_another_process_is_refused_until_the_first_ends(tmp_path):
    with RunFolder(tmp_path).locked():
        refused = try_elsewhere(tmp_path)
        assert refused.returncode == 1
        assert "BlockingIOError" in refused.stderr
        with pytest.raises(RunFolderError, match=f"Another process is training in {tmp_path}"), RunFolder(tmp_path).locked():
            pass
    assert try_elsewhere(tmp_path).stdout == "held\n"


def test_workers_of_a_killed_process_do_not_keep_the_lock(tmp_path):
    process = subprocess.Popen(command(WORKER, tmp_path), stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        assert try_elsewhere(tmp_path).returncode == 1
        process.kill()
        process.wait(timeout=60)
        os.kill(worker, 0)  # is alive
        assert try_elsewhere(tmp_path).stdout == "held\n"
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()
    refusal = pytest.raises(RunFolderError, match="cannot be locked against other processes: Is a directory")
    with refusal, RunFolder(tmp_path).locked():
        pass
