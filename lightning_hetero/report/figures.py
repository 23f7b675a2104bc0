"""Pictures of plans and steps, each a figure of matplotlib; `save` writes them as PNG or SVG."""

from lightning_hetero.report.canvas import save
from lightning_hetero.report.gantt import gantt, gantt_pair

__all__ = ["gantt", "gantt_pair", "save"]
