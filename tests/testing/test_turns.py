"""Later prompt turns and chunks of a text: how they are cut into passes, and what is said where they do not fit."""

from __future__ import annotations

import pytest

from kvpolicy.language import load_policy
from kvpolicy.language.base import Complaint
from kvpolicy.testing.feeding import Pass, RuntimeBeside, passes, plan_for
from kvpolicy.testing.patterns import synthesize

TEXT = {
    "pattern": "uniform",
    "noise": 2.0,
    "prompt": [7, 3],
    "steps": 9,
    "chunk": 3,
    "turns": [{"after": 4, "prompt": [0, 5]}, {"after": 2, "prompt": 1}],
}


def told(now: Pass) -> str:
    spans = ",".join(f"{span.start}:{span.stop}" for span in now.rows)
    return f"{now.kind[0]} {spans}{'+' if now.more else ''}"


def test_passes_follow_the_turns_and_their_chunks() -> None:
    cut = [told(now) for now in passes(synthesize(TEXT), None)]
    assert cut[:3] == ["p 0:3,0:0+", "p 3:6,0:2+", "p 6:7,2:3"]
    assert cut[3:7] == ["g 7:8,3:4", "g 8:9,4:5", "g 9:10,5:6", "g 10:11,6:7"]
    assert cut[7:] == [
        "p 11:11,7:10+",
        "p 11:11,10:12",
        "g 11:12,12:13",
        "g 12:13,13:14",
        "p 13:14,14:15",
        "g 14:15,15:16",
        "g 15:16,16:17",
        "g 16:17,17:18",
    ]


def test_a_plan_has_room_for_all_turns_and_the_runtime_runs_them() -> None:
    said = synthesize(TEXT)
    plan = plan_for(load_policy("h2o", {"heavy": 4, "recent": 2}), said)
    assert (plan.prompt, plan.turns, said.length) == ((3, 9), 3, 17)  # 3: the shortest row when its first turn ends
    feed = RuntimeBeside(plan)
    for now in passes(said, None):
        feed.feed(said, now)
    assert feed.beside.cache.stats()["evicted"] > 0


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        (5, "no list of turns"),
        ([{"after": 3}], "says `after` how many"),
        ([{"after": 3, "prompt": [1, 2, 3]}], "3 prompts for 2 rows"),
        ([{"after": 3, "prompt": 0}], "brings nothing"),
        ([{"after": 6, "prompt": 1}, {"after": 4, "prompt": 1}], "only 9 tokens are generated"),
    ],
)
def test_turns_that_make_no_sense_are_complained_about(turns: object, told: str) -> None:
    with pytest.raises(Complaint, match=told):
        synthesize({**TEXT, "turns": turns})
