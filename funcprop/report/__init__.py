"""The report: one self-contained HTML page about a function, its two sweeps and its training."""

from funcprop.report.report import Report as Report
from funcprop.report.report import ReportError as ReportError
from funcprop.report.report import report as report
