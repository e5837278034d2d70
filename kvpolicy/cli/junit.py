"""Results of `kvpolicy test` as JUnit XML, which CI services read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from kvpolicy.cli.test import Result

UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold in any form."""


def junit(results: Sequence[Result]) -> str:
    """One test suite: a policy is a class name, a test a case; a policy that cannot be read is a case of its own."""
    attributes = {
        "name": "kvpolicy",
        "tests": str(len(results)),
        "failures": str(sum(result.verdict == "failed" for result in results)),
        "errors": str(sum(result.verdict == "error" for result in results)),
        "skipped": "0",
        "time": f"{sum(result.seconds for result in results):.3f}",
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for result in results:
        named = {"classname": _plain(result.policy), "name": _plain(result.test or "is valid")}
        case = ElementTree.SubElement(suite, "testcase", {**named, "time": f"{result.seconds:.3f}"})
        if result.verdict != "passed":
            message = _plain(result.message)
            kind = "failure" if result.verdict == "failed" else "error"
            ElementTree.SubElement(case, kind, {"message": message.partition("\n")[0]}).text = message
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    return UNWRITABLE.sub(lambda found: f"#x{ord(found[0]):02X}", text)
