"""What goes wrong at a user's desk, as exceptions whose text is one sentence: what, which value, the way out.

``train_net.py`` and ``demo.py`` print the sentence and exit with a non-zero code; a library caller gets the exception.
"""


class UserError(ValueError):
    """Base class: the input is wrong, not the program."""


class ConfigError(UserError):
    """A key or a combination of keys that cannot work."""


class DatasetError(UserError):
    """An annotation file, a record in it, or an image that cannot be used.

    Args:
        message: the sentence.
        kind: what ``dn-detr check`` counts it as; "" where it does not matter.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class CheckpointError(UserError):
    """Weights that are missing or do not fit the configured model."""


class LeakError(UserError):
    """A generator or a decoder that lets queries see noised ground truth that they must not see."""
