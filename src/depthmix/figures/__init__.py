"""Numbers to figures."""

from depthmix.libraries.extras import require

require("lab", "`depthmix.figures`")
