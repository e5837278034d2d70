"""Fidelity of policies on the texts of a file, as rows that can be taken up again.

    python -m kvpolicy.lab.fidelity h2o raas --model builtin:smollm2 --dataset texts.jsonl --budgets 256,1024 \\
        --new-tokens 2500 --out rows.jsonl

Prints a table, and with ``--json FILE`` writes everything that it knows. A second run with the same ``--out`` goes on
where the first one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.lab.compare.arms import arms
from kvpolicy.lab.dataset import HALF, read_dataset
from kvpolicy.lab.fidelity.measuring import Fidelity, Options
from kvpolicy.lab.fidelity.report import COLUMNS, doubts, entries, table
from kvpolicy.language import Policy, load_policy
from kvpolicy.models import load_model


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.lab.fidelity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("specs", nargs="+", metavar="SPEC", help="policies: YAML files, or names of shipped ones")
    parser.add_argument("--model", "-m", default="builtin:smollm2")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with prompt and output (or pred), or .txt")
    parser.add_argument("--split", type=float, default=HALF, help="where a .txt is cut, as a share of it")
    parser.add_argument("--budgets", default="256", help="tokens that every policy holds, as in 256,1024")
    parser.add_argument("--texts", type=int, help="of the file, the most that are read")
    parser.add_argument("--new-tokens", type=int, help="of every output, the most that are forced")
    parser.add_argument("--batch", type=int, default=8, help="texts at once")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="rows, one JSON object a line; taken up again")
    parser.add_argument("--json", type=Path, help="the report, with curves")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    asked = parsed(arguments)
    try:
        budgets: list[int | None] = [int(word) for word in asked.budgets.split(",")]
    except ValueError:
        print(f"error: --budgets {asked.budgets!r} is no list of numbers, as in 256,1024", file=sys.stderr)
        return UsageError.exit_code
    try:
        texts = read_dataset(asked.dataset, most=asked.texts, split=asked.split)
        policies: list[tuple[str, Policy, dict[str, str]]] = [(spec, load_policy(spec), {}) for spec in asked.specs]
        model, tokenizer = load_model(asked.model, device=asked.device, dtype=asked.dtype)
        options = Options(asked.new_tokens, asked.batch, compile=asked.compile)
        run = Fidelity(model, tokenizer, asked.model, options, asked.out, _told)
        run.run(arms(policies, budgets), texts)
        found = entries(run.rows)
    except KvpolicyError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    for sentence in run.refusals():
        print(sentence, file=sys.stderr)
    lines = [COLUMNS, *table(found)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, wide, strict=True)).rstrip())
    for doubt in doubts(found):
        print(doubt, file=sys.stderr)
    if asked.json:
        asked.json.write_text(json.dumps([entry.to_dict() for entry in found], indent=1), encoding="utf-8")
    return 0


def _told(done: int, total: int, what: str) -> None:
    end = "" if sys.stderr.isatty() else "\n"
    if end and "tokens" in what:
        return
    print(f"\r\033[K{done} of {total}: {what}" if not end else f"{done} of {total}: {what}", end=end, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
