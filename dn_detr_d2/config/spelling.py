"""Which key somebody meant who wrote one that does not exist."""

from collections.abc import Collection, Iterator

MOST_EDITS = 4  # the search doubles with each


def names(cfg: dict, above: str = "") -> Iterator[str]:
    """The full name of every key of a config, and of every node on the way."""
    for key, value in cfg.items():
        yield above + key
        if isinstance(value, dict):
            yield from names(value, f"{above}{key}.")


def nearest_key(wrong: str, known: Collection[str]) -> str | None:
    """The key or node that the fewest wrong letters turn into ``wrong``.

    An edit is one letter left out, added or changed, or two neighbours exchanged. A third of what differs may be wrong, one
    letter at least. Further away only a key is taken that has more levels: ``MODEL.NUM_QUERIES`` lacks one.

    Args:
        wrong: a full key, or a node at any depth, such as ``SOLVR``.
        known: what there is, see :func:`names`.
    """
    for edits in range(1, MOST_EDITS + 1):
        too_far = False
        for key in known:
            if _within(edits, wrong, key):
                if edits == 1 or 3 * edits <= _differing(wrong, key):
                    return key
                too_far = True
        if too_far:
            return None
    longer = sorted((key for key in known if _lacks_levels(wrong, key)), key=_depth)
    certain = len(longer) == 1 or (longer and _depth(longer[0]) < _depth(longer[1]))
    return longer[0] if certain else None


def _depth(key: str) -> int:
    return key.count(".")


def _lacks_levels(wrong: str, key: str) -> bool:
    """Whether all parts of ``wrong`` stand in ``key`` in this order, the last of them at the end."""
    parts = iter(key.split("."))
    return all(part in parts for part in wrong.split(".")) and next(parts, None) is None


def _differing(a: str, b: str) -> int:
    """Letters of ``a`` from the first of its parts that is not the same in ``b``."""
    return len(a) - (f"{a}."[: _same(f"{a}.", f"{b}.")].rfind(".") + 1)


def _same(a: str, b: str) -> int:
    """Letters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _within(edits: int, a: str, b: str) -> bool:
    """Whether so many edits turn ``a`` into ``b``."""
    if abs(len(a) - len(b)) > edits:
        return False
    same = _same(a, b)
    a, b = a[same:], b[same:]
    if not a or not b:
        return True  # what is left of the other is not longer than edits
    if edits == 0:
        return False
    rests = [(a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    if len(a) > 1 and a[:2] == b[1::-1]:
        rests.append((a[2:], b[2:]))
    return any(_within(edits - 1, *rest) for rest in rests)
