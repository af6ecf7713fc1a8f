"""One run: its settings, its folder, the trainers, and the training itself."""

from depthmix.libraries.extras import require

require("lab", "`depthmix.training`")
