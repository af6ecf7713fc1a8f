"""Intervals, tests and resampling."""

from depthmix.libraries.extras import require

require("lab", "`depthmix.statistics`")
