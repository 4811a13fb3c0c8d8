"""What an ordeal found, as a row of a table."""

from dataclasses import dataclass, field


@dataclass
class Result:
    """One ordeal.

    Attributes:
        ordeal: its name.
        trials: how often.
        seen: what happened, in words.
        wrong: what must not have happened, in words; the number may be larger than the list.
        seconds: it took.
    """

    ordeal: str
    trials: int
    seen: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def table(results: list[Result]) -> str:
    """All of them, with what was wrong below."""
    lines = ["| ordeal | trials | seen | wrong | seconds |", "|---|---|---|---|---|"]
    lines += [f"| {r.ordeal} | {r.trials:,} | {r.seen} | {len(r.wrong)} | {r.seconds:.0f} |" for r in results]
    return "\n".join([*lines, *(f"{r.ordeal}: {line}" for r in results for line in r.wrong[:10])])
