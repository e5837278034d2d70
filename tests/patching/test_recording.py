"""When CUDA graphs are recorded, and what happens where they cannot be: on stand-ins for torch's own."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from kvpolicy.runtime.recording import CudaRecorder, NoRecorder, recorder_for


class Graph:
    """What is called while it records is what a replay does."""

    recording: "Graph | None" = None

    def __init__(self):
        self.work = []

    def replay(self):
        for each in self.work:
            each()


@pytest.fixture
def cuda(monkeypatch):
    """Notes streams, pools and captures; `cuda.fails` makes captures impossible."""

    class Noted:
        fails = False
        pools = 0
        captures = ()

        def wait_stream(self, other):
            pass

    noted = Noted()

    @contextmanager
    def graph(made, pool, stream):
        noted.captures += ((pool, stream),)
        Graph.recording = made
        try:
            yield
            if noted.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        finally:
            Graph.recording = None

    def new_pool():
        noted.pools += 1
        return noted.pools

    for name, value in {
        "Stream": lambda device: noted,
        "current_stream": lambda device: Noted(),
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": new_pool,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return noted


def counting(done, name):
    """Work that the device does now, or whenever what is recorded is replayed."""

    def work():
        if Graph.recording is not None:
            Graph.recording.work.append(lambda: done.append(name))
        else:
            done.append(name)

    return work


def test_each_kind_warms_up_is_recorded_once_and_nothing_is_done_twice(cuda):
    recorder, done = CudaRecorder(torch.device("cuda"), warm_up=2), []
    plain, update = counting(done, "plain"), counting(done, "update")
    order = [plain, plain, update, plain, plain, update, update, plain, update]
    for work in order:
        recorder.run(work, True)
    assert done == ["plain" if work is plain else "update" for work in order]
    assert cuda.captures == ((1, cuda), (1, cuda))  # one pool, the stream of the warm-up


def test_nothing_is_recorded_or_counted_before_it_is_compiled(cuda):
    recorder, done = CudaRecorder(torch.device("cuda"), warm_up=1), []
    work = counting(done, "plain")
    for _ in range(5):
        recorder.run(work, False)
    recorder.run(work, True)
    assert not cuda.captures
    recorder.run(work, True)
    assert len(cuda.captures) == 1 and len(done) == 7


def test_what_cannot_be_captured_is_said_once_and_runs(cuda):
    cuda.fails = True
    recorder, done = CudaRecorder(torch.device("cuda"), warm_up=1), []
    work, other = counting(done, "plain"), counting(done, "update")
    recorder.run(work, True)
    with pytest.warns(
        UserWarning, match=r"cannot be captured as a CUDA graph \(operation not permitted when stream is"
    ):
        recorder.run(work, True)
    for _ in range(3):
        recorder.run(other, True)
        recorder.run(work, True)
    assert len(cuda.captures) == 1 and done.count("plain") == 5 and done.count("update") == 3


def test_what_is_forgotten_is_recorded_anew_in_a_pool_of_its_own(cuda):
    recorder, done = CudaRecorder(torch.device("cuda"), warm_up=1), []
    work = counting(done, "plain")
    for _ in range(3):
        recorder.run(work, True)
    recorder.forget()
    for _ in range(3):
        recorder.run(work, True)
    assert cuda.captures == ((1, cuda), (2, cuda)) and len(done) == 6


def test_who_records(cuda):
    assert isinstance(recorder_for(torch.device("cuda")), CudaRecorder)
    assert isinstance(recorder_for(torch.device("cuda"), capture=False), NoRecorder)
    assert isinstance(recorder_for(torch.device("cpu")), NoRecorder)
    assert isinstance(recorder_for(torch.device("cpu"), capture=True), NoRecorder)
