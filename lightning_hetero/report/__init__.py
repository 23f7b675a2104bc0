"""What was decided and what happened, for people: pictures, and a page of HTML with all of them."""

from lightning_hetero.report.borders import Border, borders_of
from lightning_hetero.report.html import write_html
from lightning_hetero.report.sweep import write_table_chart

__all__ = ["Border", "borders_of", "write_html", "write_table_chart"]
