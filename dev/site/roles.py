"""An extension of Griffe, which reads docstrings for the site: roles of reStructuredText become code."""

import re

import griffe


class Roles(griffe.Extension):
    """``:func:`name``` is shown as ```name```."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Changes the docstring of an object."""
        if obj.docstring:
            text = re.sub(r":[a-z]+:`[~.]*([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # a block of code follows
