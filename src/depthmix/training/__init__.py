"""A run: its settings, its folder, and the training itself."""

from depthmix.extras import require

require("lab", "`depthmix.training`")
