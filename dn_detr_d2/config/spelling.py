"""The existing key that a misspelt one is nearest to."""

from collections.abc import Collection, Iterator
from difflib import SequenceMatcher, get_close_matches

MIN_SIMILARITY = 0.9  # of a long key; difflib's ratio, twice the letters that match over those of both keys


def names(cfg: dict, above: str = "") -> Iterator[str]:
    """The full name of every key of a config, and of every node on the way."""
    for key, value in cfg.items():
        yield above + key
        if isinstance(value, dict):
            yield from names(value, f"{above}{key}.")


def nearest_key(wrong: str, known: Collection[str]) -> str | None:
    """The key or node that is spelled most like ``wrong``, None if none is spelled much like it.

    One wrong letter, or two neighbours exchanged, is always near enough. Of what is spelled otherwise a key is taken that
    only has more levels: ``MODEL.NUM_QUERIES`` lacks one.

    Args:
        wrong: a full key, or a node at any depth, such as ``SOLVR``.
        known: what there is, see :func:`names`.
    """
    letters = max(len(wrong), 2)
    exchanged = (letters - 1) / letters  # the similarity of two keys that differ by two neighbours exchanged
    # A node above `wrong` exists, so it is not what was misspelt.
    candidates = [key for key in known if not wrong.startswith(f"{key}.")]
    if near := get_close_matches(wrong, candidates, n=3, cutoff=min(MIN_SIMILARITY, exchanged)):
        matchers = {key: SequenceMatcher(None, key, wrong) for key in near}
        return max(near, key=lambda key: (matchers[key].ratio(), matchers[key].quick_ratio()))
    longer = sorted((key for key in known if _lacks_levels(wrong, key)), key=_depth)
    certain = len(longer) == 1 or (longer and _depth(longer[0]) < _depth(longer[1]))
    return longer[0] if certain else None


def _depth(key: str) -> int:
    return key.count(".")


def _lacks_levels(wrong: str, key: str) -> bool:
    """Whether all parts of ``wrong`` occur in ``key`` in this order, the last of them at the end."""
    parts = iter(key.split("."))
    return all(part in parts for part in wrong.split(".")) and next(parts, None) is None
