"""Findings of ``stunet doctor``: what was examined, its state, what to do; as lines or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

OK, WARNING, WRONG = "ok", "! ", "!!"
NAMES = {OK: "ok", WARNING: "warning", WRONG: "wrong"}
"""Of the marks, in JSON."""


class Finding(NamedTuple):
    """One line of the report: OK, WARNING or WRONG, what was examined, its state, what to do."""

    mark: str
    what: str
    state: str
    advice: str = ""


def report(findings: Iterable[Finding], as_json: bool, fine: str) -> int:
    """Print findings, each as soon as it is known, and ``fine`` if nothing is wrong; return 0 if
    so, else 1."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            print(f"[{finding.mark}] {finding.what}: {finding.state}", flush=True)
            if finding.advice:
                print(f"     {finding.advice}")
    wrong, warnings = (sum(x.mark == mark for x in found) for mark in (WRONG, WARNING))
    if as_json:
        entries = [{**x._asdict(), "mark": NAMES[x.mark]} for x in found]
        print(json.dumps({"wrong": wrong, "warnings": warnings, "findings": entries}, indent=1))
    else:
        looked = f" {warnings} thing(s) to look at." if warnings else ""
        end = f"{wrong} thing(s) to fix." if wrong else fine
        print(f"\n{end}{looked}")
    return 1 if wrong else 0
