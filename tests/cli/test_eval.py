"""`kvpolicy eval`: what is said before lm-eval is asked anything, whether it is installed or not."""

import pytest

from kvpolicy.cli.main import main
from kvpolicy.errors import UsageError
from kvpolicy.lab.harness import calling
from kvpolicy.lab.harness.calling import arguments_of


def test_without_the_harness_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calling, "find_spec", lambda name: None)
    assert main(["eval", "h2o", "builtin:tiny", "--", "--tasks", "gsm8k"]) == 5
    assert "pip install 'kvpolicy[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["h2o", "builtin:tiny"], 2, "lm-eval needs to know what to run"),
        (["h2o", "builtin:tiny", "--", "--tasks", "x", "--model=hf"], 2, "--model=hf is said by SPEC and MODEL"),
        (["h2o", "builtin:tiny", "--set", "heavvy=1", "--", "--tasks", "x"], 3, "heavvy"),
        (["-", "builtin:tiny", "--", "--tasks", "x"], 2, "not from stdin"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], code: int, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calling, "find_spec", lambda name: object())
    assert main(["eval", *arguments]) == code
    assert reason in capsys.readouterr().err


def test_what_the_harness_is_told() -> None:
    told = arguments_of({"pretrained": "m", "policy": "raas", "budget": "64"}, ["--tasks", "a,b"])
    assert told == ["--model", "kvpolicy", "--model_args", "pretrained=m,policy=raas,budget=64", "--tasks", "a,b"]
    with pytest.raises(UsageError, match="splits its model arguments at commas"):
        arguments_of({"policy": "a,b.yaml"}, ["--tasks", "x"])
