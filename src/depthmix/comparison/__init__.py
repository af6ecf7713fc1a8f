"""Evaluated runs, compared on the same items."""

from depthmix.libraries.extras import require

require("lab", "`depthmix.comparison`")
