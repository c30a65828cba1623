"""Logs of a run besides metrics.jsonl, the latter two with the real packages if they are installed."""

import json
import math
import re
import resource
import shutil
import struct
import sys
import time

import pytest

from widekernel.engine.loggers import create_loggers, require_packages
from widekernel.engine.logging_config import LoggingConfig
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.run_log import RunLog
from widekernel.errors import ConfigError, WidekernelError


class Recorder:
    def __init__(self, fails_at=None):
        self.name, self.fails_at, self.calls = "Recorder", fails_at, []

    def _note(self, *call):
        self.calls.append(call)
        if call[0] == self.fails_at:
            raise OSError("the network is down")

    def resume(self, rows, logged):
        self._note("resume", [row["step"] for row in rows], logged)

    def row(self, step, row):
        self._note("row", step, row["train_loss"])

    def flush(self):
        self._note("flush")

    def close(self, finished):
        self._note("close", finished)


def row(step, **more):
    return {"epoch": 1, "step": step, "train_loss": 1 / step, "lr": 0.1, **more}


def write_rows(path, loggers, keep, *steps, close=True):
    log = RunLog(path, loggers)
    log.truncate(keep)
    for step in steps:
        log.append(row(step))
    log.sync()
    if close:
        log.close(finished=True)
    return log


def test_loggers_follow_metrics_jsonl(tmp_path):
    path, first, second = tmp_path / "metrics.jsonl", Recorder(), Recorder()
    log = write_rows(path, [first], 0, 2, 4, 6)
    assert log.rows == 3
    rows = [("row", 2, 0.5), ("row", 4, 0.25), ("row", 6, 1 / 6)]
    assert first.calls == [("resume", [], 0), *rows, ("flush",), ("close", True)]
    write_rows(path, [second], 1, 4, close=False).close(finished=False)
    assert second.calls == [("resume", [2], 6), ("row", 4, 0.25), ("flush",), ("close", False)]
    assert [entry["step"] for entry in read_metrics(path)] == [2, 4]


@pytest.mark.parametrize("fails_at", ["resume", "row", "flush", "close"])
def test_a_logger_that_fails_is_off_and_said_once(tmp_path, fails_at):
    messages, broken, sound = [], Recorder(fails_at), Recorder()
    log = RunLog(tmp_path / "metrics.jsonl", [broken, sound], messages.append)
    log.truncate(0)
    for step in (1, 2):
        log.append(row(step))
        log.sync()
    log.close(finished=True)
    assert len(messages) == 1
    assert re.search(r"Recorder is off .*OSError: the network is down.*metrics\.jsonl has all rows", messages[0])
    names = [call[0] for call in broken.calls]
    assert names.count(fails_at) == (2 if fails_at == "close" else 1) and names[-1] == "close"
    assert [call[0] for call in sound.calls] == ["resume", "row", "flush", "row", "flush", "close"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_an_error_of_metrics_jsonl_reaches_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    recorder = Recorder()
    with pytest.raises(WidekernelError, match="cannot be written"):
        RunLog(tmp_path / "metrics.jsonl", [recorder]).append(row(1))
    assert recorder.calls == [("row", 1, 1.0)]


def test_all_logs_have_the_rows_of_a_time_when_the_disk_was_full(tmp_path):
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    log = RunLog(path, [recorder])
    log.append(row(1))
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, hard))
    try:
        with pytest.raises(WidekernelError, match="File too large"):
            log.append(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and log.rows == 1
    log.append(row(3))
    assert [entry["step"] for entry in read_metrics(path)] == [step for _, step, _ in recorder.calls] == [1, 2, 3]


def test_settings():
    assert create_loggers(LoggingConfig(), None, {}) == []
    assert create_loggers(LoggingConfig(wandb_project="p", wandb_mode="disabled"), None, {}) == []
    for changes, words in (
        ({"wandb_mode": "offlin"}, "logging.wandb_mode.*Did you mean 'offline'"),
        ({"wandb_mode": "offline"}, "set logging.wandb_project"),
        ({"wandb_project": " "}, "logging.wandb_project is ' '"),
    ):
        with pytest.raises(ConfigError, match=words):
            LoggingConfig(**changes)


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [(LoggingConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
     (LoggingConfig(wandb_project="p"), "wandb", "wandb")],
)  # fmt: skip
def test_a_missing_package_is_an_error_with_the_command(config, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"package {extra} cannot be imported.*pip install 'widekernel\[{extra}\]'"):
        require_packages(config)


def test_tensorboard_shows_no_step_twice_and_loses_none(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def make():
        return create_loggers(LoggingConfig(tensorboard=True), tmp_path, {})

    path = tmp_path / "metrics.jsonl"
    write_rows(path, make(), 0, 2, 4, 6, close=False)  # a process that dies here has flushed three rows
    log = RunLog(path, make())
    log.truncate(2)
    log.append(row(5))
    log.truncate(2)  # a run may return to an earlier state
    for entry in (row(6, val_top1=math.nan), row(8, val_top1=60.0, note="no number", flag=True)):
        log.append(entry)
    log.close(finished=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("val_top1")][1] == 60
    assert set(events.Tags()["scalars"]) == {"epoch", "train_loss", "lr", "val_top1"}
    shutil.rmtree(tmp_path / "tensorboard")  # as if TensorBoard was switched on now
    write_rows(path, make(), 3, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6, 8]


def wandb_records(path):
    """Yield the records of a .wandb file, whose format is that of LevelDB's logs after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # the end of a block is padded
            at += left
            continue
        length, part = struct.unpack_from("<xxxxHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_contents(folder):
    """Return the steps, configuration and identifiers in the files of offline runs, oldest first."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of a process: waits until all is written
    steps, settings, identifiers = [], {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in map(Record.FromString, wandb_records(file)):
            if record.HasField("history"):
                steps.append(record.history.step.num)
            if record.HasField("run"):
                identifiers.append(record.run.run_id)
                settings.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
    return steps, settings, identifiers


def test_wandb_offline_continues_the_same_run(tmp_path, capfd):
    pytest.importorskip("wandb")
    messages = []

    def make():
        config = LoggingConfig(wandb_project="tests", wandb_mode="offline")
        return create_loggers(config, tmp_path, {"seed": 3, "loop": {"batch_size": 8}}, messages.append)

    path = tmp_path / "metrics.jsonl"
    write_rows(path, make(), 0, 2, 4, 6)
    _, _, first = wandb_contents(tmp_path)
    time.sleep(1.01)  # the name of a folder of wandb has the second in it
    log = RunLog(path, make(), messages.append)
    log.truncate(2)  # wandb may have lost the rows that it got before; so a new file has all of them
    log.append(row(6))
    log.truncate(2)  # a run may return to an earlier state
    for step in (6, 8):
        log.append(row(step))
    log.close(finished=True)
    assert messages == []
    steps, settings, identifiers = wandb_contents(tmp_path)
    assert steps == [2, 4, 6, 8]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == len(list(tmp_path.glob("wandb/superseded-*"))) == 1
    assert settings["seed"] == 3 and settings["loop"] == {"batch_size": 8}
    assert set(first) == set(identifiers) == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert capfd.readouterr() == ("", "")


class OnlineRun:
    """Pretends to be a run that the service knows up to a step."""

    url, logged = "https://example.org/run", []

    def __init__(self, step):
        self.step = step

    def log(self, figures, step):
        self.logged.append(step)

    def finish(self, exit_code):
        self.logged.append(f"exit code {exit_code}")


@pytest.mark.parametrize(("known", "sent"), [(3, [4, 6, 8]), (5, [6, 8]), (7, [8])])
def test_wandb_online_gets_the_rows_that_it_lacks(tmp_path, monkeypatch, known, sent):
    wandb = pytest.importorskip("wandb")
    given, messages = [], []
    monkeypatch.setattr(OnlineRun, "logged", [])
    monkeypatch.setattr(wandb, "init", lambda **options: given.append(options) or OnlineRun(known))
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    (tmp_path / "wandb.json").write_text('{"project": "tests", "id": "abc"}')
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [], 0, 2, 4, 6)
    config = LoggingConfig(wandb_project="tests")
    log = write_rows(path, create_loggers(config, tmp_path, {}, messages.append), 2, 6, 8, close=False)
    log.close(finished=False)
    assert OnlineRun.logged == [*sent, "exit code 1"]
    assert (given[0]["id"], given[0]["resume"], given[0]["mode"]) == ("abc", "allow", "online")
    assert messages == ["Weights & Biases: https://example.org/run"]


def test_wandb_online_needs_an_account(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no API key: run `wandb login`"):
        require_packages(LoggingConfig(wandb_project="p"))
