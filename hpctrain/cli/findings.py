"""What `hpctrain doctor` finds: one answer per check and rank, and one list of them for all ranks.

A check answers with `ok`, `note`, `warn` or `fail`; whatever it raises becomes a failed finding
with the cause, so that a broken machine is described and never hides the rest of the report.

Given functions without arguments. Knows nothing of what they check, and nothing of MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "Answer",
    "Check",
    "Finding",
    "answer_of",
    "fail",
    "lines",
    "merge",
    "note",
    "ok",
    "ranks_text",
    "warn",
    "worst",
]

STATUSES = ("ok", "note", "warn", "FAIL")  # from good to bad


@dataclass(frozen=True)
class Answer:
    """What a check says on one rank. `varies`: the value differs between ranks by nature."""

    status: str
    value: str
    remedy: str = ""
    varies: bool = False


def ok(value: str, varies: bool = False) -> Answer:
    """As it should be."""
    return Answer("ok", value, varies=varies)


def note(value: str, remedy: str, varies: bool = False) -> Answer:
    """Right for many, but worth knowing; `remedy` says what to do for whom it is not."""
    return Answer("note", value, remedy, varies)


def warn(value: str, remedy: str, varies: bool = False) -> Answer:
    """A run will work, but slowly, or not to the end, or not as meant."""
    return Answer("warn", value, remedy, varies)


def fail(value: str, remedy: str) -> Answer:
    """A run will not work."""
    return Answer("FAIL", value, remedy)


@dataclass(frozen=True)
class Check:
    """One line of the report: its section, what is looked at, and the function that looks.

    The function answers None where the check has nothing to say on this rank.
    """

    section: str
    what: str
    function: Callable[[], Answer | None]


@dataclass(frozen=True)
class Finding:
    """The answers of all ranks to one check; `differs` maps each value to its ranks, if several."""

    section: str
    what: str
    status: str
    value: str
    remedy: str = ""
    differs: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        return asdict(self)


def answer_of(check: Check) -> Answer | None:
    """Run one check; an exception becomes a failed answer that names it."""
    try:
        return check.function()
    except Exception as error:  # the report must go on, whatever is broken
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return fail(f"the check itself failed ({cause})", "repair the cause named here first")


def merge(checks: Sequence[Check], answers: Sequence[Sequence[Answer | None]]) -> list[Finding]:
    """One finding per check from `answers[rank][check]`; the worst status of any rank counts.

    Values that differ between ranks, and do not vary by nature, are listed with their ranks.
    """
    findings = []
    for index, check in enumerate(checks):
        given = [(rank, row[index]) for rank, row in enumerate(answers)]
        here = [(rank, answer) for rank, answer in given if answer is not None]
        if here:
            findings.append(_merged(check, here))
    return findings


def _merged(check: Check, given: list[tuple[int, Answer]]) -> Finding:
    level = max(STATUSES.index(answer.status) for _, answer in given)
    bad = next(answer for _, answer in given if STATUSES.index(answer.status) == level)
    ranks: dict[str, list[int]] = {}
    for rank, answer in given:
        ranks.setdefault(answer.value, []).append(rank)
    status, value, remedy = bad.status, bad.value, bad.remedy
    if len(ranks) == 1 or all(answer.varies for _, answer in given):
        return Finding(check.section, check.what, status, value, remedy)
    value = "; ".join(f"{ranks_text(who)}: {text}" for text, who in ranks.items())
    if status == "ok":
        status, remedy = "note", "the ranks differ here; give all nodes the same set-up"
    return Finding(check.section, check.what, status, value, remedy, ranks)


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-3, 6": ascending ranks, runs of them shortened."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def worst(findings: Iterable[Finding]) -> str:
    """The worst status of all findings."""
    return STATUSES[max((STATUSES.index(f.status) for f in findings), default=0)]


def lines(findings: Sequence[Finding]) -> list[str]:
    """The report as text: a title per section, a line per finding, its remedy below it."""
    text: list[str] = []
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            text += ["", section]
        tag = f"[{finding.status}]"
        text.append(f"  {tag:6} {finding.what}: {finding.value}")
        if finding.remedy:
            text.append(f"         -> {finding.remedy}")
    count = {status: sum(f.status == status for f in findings) for status in STATUSES}
    text += ["", ", ".join(f"{status}: {number}" for status, number in count.items())]
    return text
