"""docs/papers.md: every command that a test cannot run names verbs, flags, policies, params and suites that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.cli.arguments import parse_settings
from kvpolicy.cli.compare import split
from kvpolicy.cli.main import command_of
from kvpolicy.language import load_policy

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def parsed(command: str) -> tuple[str, dict[str, Any], list[str]]:
    """The verb, what its own parser makes of the words, and what stands behind --."""
    program, verb, *words = shlex.split(command)
    assert program == "kvpolicy"
    cut = words.index("--") if "--" in words else len(words)
    context = command_of(verb).make_context(verb, words[:cut])
    return verb, context.params, words[cut + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_called(command: str) -> None:
    verb, given, rest = parsed(command)
    specs = {"eval": lambda: [given["spec"]], "bench": lambda: given["specs"], "compare": lambda: _specs(given)}[verb]()
    params = parse_settings(given.get("settings"))
    for spec in specs:
        load_policy(spec, set=params if verb == "eval" else None)
    if verb == "eval":
        assert "--tasks" in rest and rest[rest.index("--tasks") + 1].isidentifier()
    if given.get("suite"):
        from kvpolicy.lab.suites.running import suite_named

        assert suite_named(given["suite"]).experiments


def _specs(given: dict[str, Any]) -> list[str]:
    return [] if given["suite"] else split(given["specs"])[0]


@pytest.mark.parametrize("command", [command for command in COMMANDS if " eval " in command])
def test_the_harness_knows_what_it_is_told(command: str) -> None:
    """Flags are lm-eval's own, and so are tasks that come from no folder of the reader's."""
    pytest.importorskip("lm_eval", reason="needs kvpolicy[eval]")
    import lm_eval

    _, _, rest = parsed(command)
    flags = {word for word in rest if word.startswith("--")}
    assert flags <= {"--tasks", "--limit", "--include_path"}
    if "--include_path" not in flags:
        root = Path(lm_eval.__file__).parent / "tasks"
        task = rest[rest.index("--tasks") + 1]
        near = [path for path in root.rglob("*.yaml") if re.search(rf"^task: {task}$", path.read_text(), re.MULTILINE)]
        assert near, task


def test_there_is_a_command_for_each_experiment() -> None:
    text = "\n".join(COMMANDS)
    for word in ("gsm8k", "minerva_math500", "aime24", "--suite raas", "--suite scope", "touch=25%", "beta2=64",
                 "alpha=4096", "bench raas", "scope-slide-snapkv"):  # fmt: skip
        assert word in text
