"""Intervals, tests and resampling."""

from depthmix.extras import require

require("lab", "`depthmix.statistics`")
