"""A report that counts the issues of a data set and keeps the first records of each kind."""

from collections import Counter
from dataclasses import dataclass, field

from .issues import Issue, Severity

SHOWN = 5  # records of each kind that are named


@dataclass
class Report:
    """Findings about one data set.

    Attributes:
        counts: how often each issue was found.
        first: the first ``SHOWN`` records of each kind, in words.
        num_images, num_annotations, num_categories: entries of the file.
        fullest: objects of the fullest image, and its name in words.
        objects: {range of objects in an image: images}.
        classes: {name: boxes}, in the order of the category ids.
        masks: whether masks are trained, so that what is wrong with them is a problem.
        annotated: whether there is an annotation file; else there are images alone.
    """

    counts: Counter = field(default_factory=Counter)
    first: dict[Issue, list[str]] = field(default_factory=dict)
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    fullest: tuple[int, str] = (0, "none")
    objects: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    masks: bool = False
    annotated: bool = True

    def add(self, kind: Issue, where: str) -> None:
        """Counts one finding of a kind; ``where`` names the record and the value."""
        self.counts[kind] += 1
        named = self.first.setdefault(kind, [])
        if len(named) < SHOWN:
            named.append(where)

    def add_rows(self, kind: Issue, rows, describe) -> None:
        """Counts a finding for each of ``rows``; ``describe(row)`` is called for the named ones only."""
        named = rows[: max(0, SHOWN - self.counts[kind])]
        for row in named:
            self.add(kind, describe(int(row)))
        if len(rows):
            self.counts[kind] += len(rows) - len(named)

    def problems(self) -> dict[Issue, int]:
        """{kind: count} of everything that is a problem, worst first."""
        none = {Severity.FINE} if self.masks else {Severity.FINE, Severity.MASKS}
        return {kind: n for kind, n in self.ordered() if kind.severity not in none}

    def ordered(self) -> list[tuple[Issue, int]]:
        """(kind, count) of everything found, worst first, then in the order of ``Issue``."""
        found = [(kind, self.counts[kind]) for kind in Issue if self.counts[kind]]
        levels = list(Severity)
        return sorted(found, key=lambda pair: levels.index(pair[0].severity))

    def lines(self) -> list[str]:
        """The findings for a reader."""
        lines = [f"{self.num_images} images"]
        if self.annotated:
            lines[0] += f", {self.num_annotations} annotations, {self.num_categories} categories"
            lines.append(f"objects in an image: at most {self.fullest[0]} ({self.fullest[1]})")
        lines += [f"{objects:>9} objects: {images} images" for objects, images in self.objects.items()]
        if self.classes:
            lines.append("boxes of each class: " + ", ".join(f"{name!r} {n}" for name, n in self.classes.items()))
        for level in Severity:
            found = [(kind, n) for kind, n in self.ordered() if kind.severity is level]
            if found:
                stops = level is Severity.STOPS and not self.annotated
                lines.append("the training leaves it out:" if stops else f"{level.value}:")
            for kind, n in found:
                more = f", and {n - len(self.first[kind])} more" if n > len(self.first[kind]) else ""
                lines.append(f"  {n} x {kind}: {'; '.join(self.first[kind])}{more}")
        return [*lines, self.verdict()]

    def verdict(self) -> str:
        """One sentence."""
        problems = self.problems()
        return f"{sum(problems.values())} problems of {len(problems)} kinds" if problems else "no problems"
