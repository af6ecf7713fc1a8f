"""Numbers to figures."""

from depthmix.extras import require

require("lab", "`depthmix.figures`")
