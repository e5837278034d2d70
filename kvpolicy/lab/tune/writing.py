"""The chosen settings as a policy of its own: the text that was given, with other defaults and where they are from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from kvpolicy.errors import KvpolicyError
from kvpolicy.lab.tune.report import memory, share
from kvpolicy.lab.tune.search import Tuning
from kvpolicy.language import loads_policy
from kvpolicy.language.rewriting import rewritten

MODELINE = re.compile(r"# yaml-language-server:.*\n")


def tuned(run: Tuning, text: str, filename: str, name: str, command: str) -> str:
    """The policy's text with what was chosen as its defaults, which loads to the very policy that was measured.

    Args:
        text, filename: the policy that was tuned, as it was read.
        name: how the new one is to be called; what a name cannot hold is replaced.
        command: what was run.
    """
    assert run.chosen is not None
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "tuned"
    said = rewritten(text, filename, name=name, defaults=run.chosen.candidate.settings)
    line = MODELINE.match(said)
    head, rest = (line[0], said[line.end() :]) if line else ("", said)
    written = head + "\n".join([*_origin(run, command), "#", rest])
    if loads_policy(written, filename).digest != run.chosen.candidate.policy.digest:
        raise KvpolicyError(f"the text that was written for {name} does something else than what was measured")
    return written


def _origin(run: Tuning, command: str) -> Iterator[str]:
    """Where the defaults come from, as comments."""
    assert run.chosen is not None
    found, (least, most) = run.chosen.found, run.lengths.prompt
    prompts = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    asked = (
        f"the best agreement within {memory(run.goal.memory)}"
        if run.goal.memory is not None
        else f"the least memory with an agreement of {run.goal.agreement:.1%}"
    )
    names = list(dict.fromkeys(name for name, _, _ in run.texts))
    texts = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    chosen = " ".join(f"{name}={value}" for name, value in run.chosen.candidate.settings.items()) or "none was changed"
    lines = [
        f"The defaults are those of {run.policy.name}, tuned for {asked}: {chosen}.",
        f"Measured on {run.model} ({run.dtype}): the full cache's first choice at {share(found)} of "
        f"{found.places:,} places, KL {found.kl.value:.2g} nats, in {run.chosen.bytes:,} bytes a row where the full "
        f"cache takes {run.full:,}. It was chosen on these texts; others may come out lower.",
        f"Texts: {texts}; {prompts} tokens of prompt, at most {run.lengths.new_tokens:,} after it. Memory is that of "
        "these lengths, and so are the numbers.",
        f"Seed {run.options.seed}; {versions}.",
        f"Made by: {command}",
    ]
    for text in lines:
        yield from textwrap.wrap(text, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
