"""What a scenario found, as a row of a table."""

from dataclasses import dataclass, field


@dataclass
class Result:
    """One scenario.

    Attributes:
        scenario: its name.
        trials: how often it was tried.
        observed: what happened, in words.
        wrong: what must not have happened, in words.
        seconds: wall time.
    """

    scenario: str
    trials: int
    observed: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def table(results: list[Result]) -> str:
    """All results, with the first violations of each below."""
    lines = ["| scenario | trials | observed | wrong | seconds |", "|---|---|---|---|---|"]
    lines += [f"| {r.scenario} | {r.trials:,} | {r.observed} | {len(r.wrong)} | {r.seconds:.0f} |" for r in results]
    lines += [f"{r.scenario}: {line}" for r in results for line in r.wrong[:10]]
    return "\n".join(lines)
