"""What a training has come to, as one HTML page; matplotlib and supervision are imported only where one is made."""

from .at_end import announce, report_after_training

__all__ = ["announce", "report_after_training"]
