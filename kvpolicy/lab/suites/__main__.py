"""``python -m kvpolicy.lab.suites``: measure what is missing on a small model, and write docs/evidence.md."""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path

from kvpolicy.errors import KvpolicyError
from kvpolicy.lab.bench.quiet import quiet_profiler

ROOT = Path(__file__).parents[3]

ITEMS, SIZE = 64, 125
"""Of the page's rows: problems of 26 lines, so that all suites take most of an hour of one core."""


def main(words: list[str] | None = None) -> int:
    """The script. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.lab.suites", description=__doc__)
    parser.add_argument("--model", default="builtin:reasoner", help="whose numbers the page has")
    parser.add_argument("--task", default="chain")
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--size", type=int, default=SIZE, help="words of a prompt")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--suites", help="those that are measured; all of them unless said")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="of evidence.md, and of evidence/ beside it")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the rows")
    parser.add_argument("--keep", action="store_true", help="write no page after measuring, for another run goes on")
    asked = parser.parse_args(words)
    quiet_profiler()
    try:
        if not asked.page:
            measure(asked)
        if not asked.keep:
            write(asked.folder)
    except KvpolicyError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    return 0


def measure(asked: argparse.Namespace) -> None:
    """Bring every suite's rows up to what is asked for; rows stay packed."""
    from kvpolicy.lab.compare.running import Options
    from kvpolicy.lab.suites.base import Lab
    from kvpolicy.lab.suites.running import SUITES, run, suite_named
    from kvpolicy.lab.tasks.registry import task_named
    from kvpolicy.models import load_model

    model, tokenizer = load_model(asked.model)
    options = Options(asked.items, size=asked.size, batch=asked.batch)
    names = (asked.suites or ",".join(SUITES)).split(",")
    for name in names:
        folder = asked.folder / "evidence" / name
        unpack(folder)
        lab = Lab.of(model, tokenizer, asked.model, task_named(asked.task), options)
        command = f"kvpolicy compare --suite {name} {asked.model} --tasks {asked.task} --items {asked.items}"
        command += f" --size {asked.size}"
        beside = [path for path in folder.parent.glob("*/*.jsonl") if path.parent != folder]
        run(suite_named(name), lab, folder, only=None, tell=_tell, command=command, beside=beside)
    for name in names:
        pack(asked.folder / "evidence" / name)


def _tell(done: int, total: int, what: str) -> None:
    print(f"{what} ({done} of {total})", file=sys.stderr, flush=True)


def unpack(folder: Path) -> None:
    """Lay packed rows out, but for files that a run which was cut short has left longer."""
    for packed in folder.glob("*.jsonl.xz"):
        plain = packed.with_suffix("")
        if not plain.exists():
            plain.write_bytes(lzma.decompress(packed.read_bytes()))


def pack(folder: Path) -> None:
    """Put rows into their packed form."""
    from kvpolicy.lab.suites.base import packed_name

    for plain in sorted(folder.glob("*.jsonl")):
        packed_name(plain).write_bytes(lzma.compress(plain.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        plain.unlink()


def write(folder: Path) -> None:
    """The page and its pictures."""
    from kvpolicy.lab.suites.evidence_page import drawings, page

    rows = folder / "evidence"
    for name, data in drawings(rows).items():
        (rows / name).write_bytes(data)
    (folder / "evidence.md").write_text(page(rows), encoding="utf-8")
    print(f"wrote {folder / 'evidence.md'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
