"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from tests.sessions import in_new_session

from widekernel.data.worker_signals import IgnoreGroupSignals, SignalSafeLoader
from widekernel.engine.interrupts import Interrupted, InterruptGuard, stop_signals

ALWAYS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ALWAYS)
def test_a_signal_is_remembered_and_the_handlers_return(number: int) -> None:
    former = {each: signal.getsignal(each) for each in signal.valid_signals()}
    with InterruptGuard() as guard:
        assert guard.received is None
        changed = {each for each in signal.valid_signals() if signal.getsignal(each) != former[each]}
        assert changed == set(ALWAYS)
        os.kill(os.getpid(), number)
        assert guard.received == number
    assert {each: signal.getsignal(each) for each in signal.valid_signals()} == former


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "SUBMITIT_EXECUTOR"])
def test_sigusr2_counts_inside_a_job(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal.SIGUSR2 not in stop_signals()
    monkeypatch.setenv(variable, "7")
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert guard.received == signal.SIGUSR2
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_the_first_signal_counts() -> None:
    with InterruptGuard() as guard:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert guard.received == signal.SIGUSR1


@pytest.mark.parametrize("first", ALWAYS)
def test_sigint_after_any_signal_stops_at_once(first: int) -> None:
    def signal_twice() -> None:
        with InterruptGuard():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_return_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), InterruptGuard():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is before


def test_guards_nest() -> None:
    with InterruptGuard() as outer:
        with InterruptGuard() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (inner.received, outer.received) == (signal.SIGTERM, signal.SIGUSR1)


def test_another_thread_changes_no_handlers() -> None:
    seen = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with InterruptGuard() as guard:
            seen.append((signal.getsignal(signal.SIGTERM) is before, guard.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, None)]


def load_under_signals() -> str:
    loader = SignalSafeLoader(list(range(64)), batch_size=4, num_workers=2, worker_init_fn=IgnoreGroupSignals())
    batches = iter(loader)
    next(batches)
    numbers = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    for number in numbers:  # now that the workers live, so that they do not inherit the handlers
        signal.signal(number, lambda *_: None)
    for number in numbers:
        os.killpg(0, number)
        time.sleep(0.05)
    return f"{len(list(batches))} batches"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="process groups of POSIX")
def test_loading_workers_survive_the_signals_that_clusters_send_to_all_processes() -> None:
    assert in_new_session(load_under_signals) == ("15 batches", 0)


def test_the_exception_names_the_signal() -> None:
    assert str(Interrupted(signal.SIGUSR2)) == "stopped by SIGUSR2"
    assert Interrupted(signal.SIGUSR2).signal_number == signal.SIGUSR2
