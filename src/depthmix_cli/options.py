"""What several commands take."""

from typing import Literal

Options = dict[str, str]
"""Options of a section, written with a dot on the command line."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of the weights in memory."""
