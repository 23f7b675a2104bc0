"""Pictures of plans and steps, each a figure of matplotlib; `save` writes them as PNG or SVG."""

from lightning_hetero.report.canvas import save
from lightning_hetero.report.gantt import gantt, gantt_pair
from lightning_hetero.report.memory import memory_bars
from lightning_hetero.report.sweep import sweep_chart
from lightning_hetero.report.utilisation import utilisation

__all__ = ["gantt", "gantt_pair", "memory_bars", "save", "sweep_chart", "utilisation"]
