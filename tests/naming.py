"""What a message must name. Tests ask for the kind of an error and its values; its words stand in test_messages.py."""

import re


def naming(*values):
    """A pattern that finds all ``values`` in a text, each by itself and in any order: ``match=naming("SEED", -3)``."""
    return re.compile("".join(f"(?=.*{alone(str(value))})" for value in values), re.DOTALL)


def alone(value):
    """A pattern for ``value`` that is not found inside a longer word or number: 3 is neither in 30 nor in 3.5 nor in -3."""
    before = r"(?<![\w-])(?<!\d\.)" if value[:1].isdigit() else r"(?<!\w)" if re.match(r"\w", value) else ""
    after = r"(?!\.?\d)(?!\w)" if re.search(r"\d$", value) else r"(?!\w)" if re.search(r"\w$", value) else ""
    return before + re.escape(value) + after
