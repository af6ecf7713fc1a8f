"""What a run learned: figures and a report."""

from depthmix.analysis.report import Report, Sample, report_from_result, write_report

__all__ = ["Report", "Sample", "report_from_result", "write_report"]
