"""Threads that meet in one patched model, and the places where they once could have got in one another's way."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import kvpolicy
from kvpolicy.lab import hammer as lab
from kvpolicy.lab.hammer import POLICY, Hammer, hammer, jobs
from kvpolicy.language import loads_policy
from kvpolicy.patching import patch_of
from kvpolicy.runtime.compiling import StepCompiler
from kvpolicy.testing.models import random_model


@pytest.mark.parametrize(
    ("compile", "seconds"),
    [(False, 3), pytest.param("eager", 60, marks=pytest.mark.slow), pytest.param(True, 60, marks=pytest.mark.slow)],
)
def test_every_answer_is_the_one_it_has_alone(compile, seconds):
    found = hammer(seconds, compile=compile, round_seconds=seconds / 2)
    assert not found.wrong, found.wrong[0]
    assert sum(found.done.values()) >= 2


def test_a_wrong_answer_is_told():
    found = Hammer(random_model(), loads_policy(POLICY, filename="hammered"))
    (job,) = jobs(1)
    (tokens,) = job.run(random_model())
    found.round({job: (tokens + 1,)}, 1.0, 0)
    assert found.wrong == [f"{job} answered otherwise than alone"] or len(found.wrong) == 2
    assert lab.jobs() == lab.jobs()


def test_threads_that_need_a_step_at_once_compile_it_once():
    """The compiler is slow, so that the second thread comes while the first waits for it."""
    model = kvpolicy.apply(random_model(), loads_policy(POLICY, filename="hammered"), compile="eager")
    compiler, failures = patch_of(model).compiler, []

    def slow(graph, inputs):
        time.sleep(0.3)
        return graph.forward

    compiler.backend = slow
    ids = torch.arange(2, 14)[None]
    barrier, texts = threading.Barrier(2), []

    def work():
        try:
            barrier.wait()
            texts.append(model.generate(ids, do_sample=False, max_new_tokens=9))
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
    assert texts[0].equal(texts[1])
    assert (compiler.report.graphs, compiler.report.recompiles) == (2, 0)


def test_two_shapes_never_get_one_number():
    """One thread is between counting the shapes it knows and noting its own, when another comes by."""
    compiler = StepCompiler("eager")

    class Layer(SimpleNamespace):
        __hash__ = object.__hash__

    other = Layer(plan=SimpleNamespace(shape="another"))

    class Slow:
        def __hash__(self):
            compiler._shape(other)
            return 1

    assert compiler._shape(Layer(plan=SimpleNamespace(shape=Slow()))) != compiler._shape(other)
