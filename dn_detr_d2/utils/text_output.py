"""Writes text that the terminal or a log file cannot encode with backslash escapes instead of raising an error.

A file name on Linux is any bytes; Python keeps what is not UTF-8 as lone surrogates, which no encoding writes.
"""

import logging
import sys


def escaped(text: str) -> str:
    """``text`` with what UTF-8 cannot write as backslash escapes, for what takes no error handler."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_unwritable(*loggers: str) -> None:
    """Makes stdout, stderr and the handlers of the named loggers write every text.

    Call it at the start of a program, and again after handlers were added. Streams that are no text files, and so have no
    encoding, are left as they are.

    Args:
        loggers: names; "" is the root logger.
    """
    handlers = (handler for name in loggers for handler in logging.getLogger(name).handlers)
    for stream in (sys.stdout, sys.stderr, *(getattr(handler, "stream", None) for handler in handlers)):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
