"""Calls of PEFT, without a warning that they cause."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OLD_NAME = r"`is_gradient_checkpointing` is deprecated"
"""How transformers begins its warning of a name that PEFT asks every model for."""


@contextmanager
def without_old_name() -> Iterator[None]:
    """Make or load an adapter without being warned of a name in PEFT's own code.

    PEFT asks a model for `is_gradient_checkpointing`, which transformers has renamed and warns of;
    nothing that a caller does could mend it. All other warnings stay.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OLD_NAME, category=FutureWarning)
        yield
