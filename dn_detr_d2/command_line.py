"""How the tools end."""

import sys
from collections.abc import Callable

from .errors import UserError
from .utils.text_output import escape_unwritable


def answer(work: Callable[[], list[str]]) -> int:
    """Prints the lines that ``work`` returns; a UserError is one sentence on stderr. Returns the exit code, 0 or 2."""
    escape_unwritable()
    try:
        lines = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0
