"""Pictures of trainings, of denoising and of attention, see docs/visualize.md; needs matplotlib.

Curves of trainings can be drawn from here; what needs a model is imported from the modules.
"""

from .curves import draw, table
from .runs import Group, Run, group_runs, read_run

__all__ = ["Group", "Run", "draw", "group_runs", "read_run", "table"]
