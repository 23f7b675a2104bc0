"""In what order: rules for micro-batches as data, the check of a program, and the timeline."""

from lightning_hetero.schedule.action import Action, Op
from lightning_hetero.schedule.check import check_program
from lightning_hetero.schedule.draw import draw
from lightning_hetero.schedule.gpipe import GPipe
from lightning_hetero.schedule.interleaved_1f1b import Interleaved1F1B
from lightning_hetero.schedule.one_f_one_b import OneFOneB
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.program import Program, Programs, format_programs, make_programs, parse_programs
from lightning_hetero.schedule.rule import Schedule, bounds, get_schedule, register_schedule, schedule_names
from lightning_hetero.schedule.sequential import Sequential
from lightning_hetero.schedule.timeline import TRANSFER, Span, Timeline
from lightning_hetero.schedule.trace import chrome_trace
from lightning_hetero.schedule.work_queue import WorkQueue
from lightning_hetero.schedule.zero_bubble import ZeroBubble

__all__ = [
    "TRANSFER",
    "Action",
    "GPipe",
    "Interleaved1F1B",
    "OneFOneB",
    "Op",
    "Pipeline",
    "Program",
    "Programs",
    "Schedule",
    "Sequential",
    "Span",
    "Timeline",
    "WorkQueue",
    "ZeroBubble",
    "bounds",
    "check_program",
    "chrome_trace",
    "draw",
    "format_programs",
    "get_schedule",
    "make_programs",
    "parse_programs",
    "register_schedule",
    "schedule_names",
]
