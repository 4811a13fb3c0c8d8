"""The report of :mod:`dn_detr_d2.doctor` under its verb."""

from ..doctor import main, parse_arguments

__all__ = ["main", "parse_arguments"]
