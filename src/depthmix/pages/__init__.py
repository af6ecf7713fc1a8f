"""Numbers to figures, runs to pages."""

from depthmix.pages.passages import choose_passages, read_passages
from depthmix.pages.report import Report, collect_report
from depthmix.pages.report_figures import draw_report
from depthmix.pages.report_page import show_report, write_report

__all__ = [
    "Report",
    "choose_passages",
    "collect_report",
    "draw_report",
    "read_passages",
    "show_report",
    "write_report",
]

from depthmix.libraries.extras import require

require("lab", "`depthmix.pages`")
