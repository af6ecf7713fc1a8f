"""Evaluated runs, compared on the same items."""

from depthmix.extras import require

require("lab", "`depthmix.comparison`")
