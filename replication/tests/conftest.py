"""The same set-up as for the library's own tests."""

import environment  # noqa: F401
