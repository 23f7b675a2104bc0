"""What was decided and what happened, for people: pictures, and a page of HTML with all of them."""

from lightning_hetero.report.sweep import write_table_chart

__all__ = ["write_table_chart"]
