"""Who waits for whom while torch traces."""

import threading
import time
from collections.abc import Callable

import pytest

from kvpolicy.runtime.tracing import Tracing

PATIENCE = 5.0
"""Seconds after which a thread is taken to wait for ever."""


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(PATIENCE)
    return not any(thread.is_alive() for thread in threads)


def test_a_trace_inside_a_run_waits_for_the_runs_of_others() -> None:
    tracing, order = Tracing(), list[str]()
    other_runs, other_may_end, traces = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        with tracing.run():
            other_runs.set()
            other_may_end.wait(PATIENCE)
            order.append("the other's run")

    def tracer() -> None:
        with tracing.run():
            traces.set()
            with tracing.trace(inside=True):
                order.append("trace")
            order.append("the tracer's own run")

    first = started(other)
    assert other_runs.wait(PATIENCE)
    second = started(tracer)
    assert traces.wait(PATIENCE)
    other_may_end.set()
    assert ended(first, second)
    assert order == ["the other's run", "trace", "the tracer's own run"]


@pytest.mark.parametrize("inside", [False, True])
def test_two_that_trace_at_once_take_turns(inside: bool) -> None:
    tracing, at_work, most = Tracing(), 0, 0
    both = threading.Barrier(2)

    def trace() -> None:
        nonlocal at_work, most
        with tracing.trace(inside=inside):
            at_work += 1
            most = max(most, at_work)
            time.sleep(0.05)
            at_work -= 1

    def work() -> None:
        if not inside:
            both.wait(PATIENCE)
            return trace()
        with tracing.run():
            both.wait(PATIENCE)
            trace()

    assert ended(*[started(work) for _ in range(2)])
    assert most == 1


def test_what_a_trace_inside_leaves_is_a_run_that_counts() -> None:
    tracing, traced = Tracing(), threading.Event()

    def trace() -> None:
        with tracing.trace():
            traced.set()

    with tracing.run():
        with tracing.trace(inside=True):
            pass
        thread = started(trace)
        assert not traced.wait(0.2)
    assert ended(thread) and traced.is_set()
