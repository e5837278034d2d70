"""lm-evaluation-harness over a policy's cache: tasks of a folder, with no network, scored and generated."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs kvpolicy[eval]")
pytest.importorskip("datasets", reason="needs kvpolicy[eval]")

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from kvpolicy.cli.main import main
from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.lab.harness.model import PolicyLM
from kvpolicy.models.tiny.task import WORDS, make_problem

SMALL, LARGE = 24, 400
COUNT = 6

SCORED = """
task: kvpolicy_scored
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

WRITTEN = """
task: kvpolicy_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: target
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks that builtin:tiny can do: choose the next word of the phrase, and say all of it."""
    here = tmp_path_factory.mktemp("tasks")
    lines = []
    for seed in range(COUNT):
        problem = make_problem(seed, words=10, hums=50)
        first = problem.answer(1)[0]
        others = [word for word in WORDS if word not in problem.phrase][:3]
        lines.append({"prompt": problem.prompt, "choices": [first, *others], "target": " ".join(problem.answer(24))})
    data = here / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "scored.yaml").write_text(SCORED.format(data=data))
    (here / "written.yaml").write_text(WRITTEN.format(data=data))
    return here


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def evaluated(folder: Path, **arguments: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model="kvpolicy",
        model_args={"pretrained": "builtin:tiny", **arguments},
        tasks=["kvpolicy_scored", "kvpolicy_written"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def scores(found: dict[str, Any]) -> tuple[float, float]:
    told = found["results"]
    return told["kvpolicy_scored"]["acc,none"], told["kvpolicy_written"]["exact_match,none"]


def resps(found: dict[str, Any]) -> dict[str, list[Any]]:
    """By task, what the model said of each document."""
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for task, samples in found["samples"].items()
    }


def test_a_policy_differs_at_a_small_budget_and_agrees_at_a_large_one(folder: Path) -> None:
    full = evaluated(folder)
    large = evaluated(folder, policy="streaming-llm", budget=LARGE)
    small = evaluated(folder, policy="streaming-llm", budget=SMALL)
    assert scores(full) == scores(large) == (1.0, 1.0)
    told, same = resps(full), resps(large)
    assert told["kvpolicy_written"] == same["kvpolicy_written"]
    for ours, theirs in zip(same["kvpolicy_scored"], told["kvpolicy_scored"], strict=True):
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    _, writing = scores(small)
    assert writing < 0.5
    moved = [
        abs(ours - theirs)
        for documents in zip(resps(small)["kvpolicy_scored"], told["kvpolicy_scored"], strict=True)
        for (ours, _), (theirs, _) in zip(*documents, strict=True)
    ]
    assert max(moved) > 0.1
    assert "kvpolicy" not in full["config"]
    assert large["config"]["kvpolicy"]["evicted"] == 0
    kept = small["config"]["kvpolicy"]
    assert kept["evicted"] > 0 and kept["texts"] == COUNT * 4 + COUNT and kept["texts_without_eviction"] == 0


def test_even_one_token_is_read_off_what_the_policy_kept() -> None:
    """The prompt pass itself sees everything, so a one-token answer must not be read off it."""
    context = torch.arange(5, 45).tolist()
    full, small = PolicyLM("builtin:tiny"), PolicyLM("builtin:tiny", policy="streaming-llm", budget=8)
    (told,), (kept,) = (lm._loglikelihood_tokens([(None, context, [7])], True) for lm in (full, small))
    assert abs(told[0] - kept[0]) > 1e-3
    assert small.evicted > 0


def test_a_whole_text_is_scored_step_by_step() -> None:
    """Perplexity tasks: all of the text goes through generated steps, and batches change nothing."""
    texts = [" ".join(WORDS[start : start + 30 - start]) for start in range(4)]
    alone, together = (PolicyLM("builtin:tiny", policy="h2o", heavy=6, recent=6, batch_size=size) for size in (1, 4))
    requests = [type("Instance", (), {"args": (text,)})() for text in texts]
    first, second = alone.loglikelihood_rolling(requests, True), together.loglikelihood_rolling(requests, True)
    assert first == pytest.approx(second, abs=1e-3)
    assert alone.evicted == together.evicted > 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="no policy; add policy=NAME"):
        PolicyLM("builtin:tiny", budget=8)
    with pytest.raises(KvpolicyError, match="there is no param `heavvy`"):
        PolicyLM("builtin:tiny", policy="h2o", heavvy=8)


@pytest.mark.slow  # lm-eval's command reads all of its own tasks first
def test_the_verb_runs_tasks_of_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--include_path", str(folder), "--tasks", "kvpolicy_written", "--limit", "2"]
    told = [
        "eval",
        "streaming-llm",
        "builtin:tiny",
        "--budget",
        str(SMALL),
        "--",
        *rest,
        "--output_path",
        str(tmp_path),
    ]
    assert main(told) == 0
    assert "kvpolicy_written" in capsys.readouterr().out
    (result,) = tmp_path.rglob("results_*.json")
    assert json.loads(result.read_text())["config"]["kvpolicy"]["policy"] == "streaming-llm"
