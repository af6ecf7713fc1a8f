"""One HTML page that needs no other file and no network, and lets no text of a model do harm."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from depthmix.files.drafts import write_whole

LARGEST_PAGE = 5_000_000
"""Bytes beyond which a page is slow to open, and refused."""


def render_page(
    template: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **context: Any,
) -> str:
    """Fill a template of this package, with its style sheets and scripts inside.

    Texts are escaped. The page's policy names the hashes of its own style and script and allows no
    other; the template writes it as `style_hash` and `script_hash`.

    Args:
        template: Name of the HTML file.
        styles: Names of the CSS files, joined to one in this order.
        scripts: Names of the JavaScript files, likewise.
        filters: Functions that the template may apply, by name.
        context: What the template speaks of.

    Returns:
        The page.
    """
    environment = Environment(
        loader=PackageLoader("depthmix", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    style, script = ("".join(map(_read, names)) for names in (styles, scripts))
    return environment.get_template(template).render(
        # Both are ours and go in as they are.
        style=Markup(style),
        style_hash=hash_text(style),
        script=Markup(script),
        script_hash=hash_text(script),
        **context,
    )


def write_page(page: str, path: Path, *, way_out: str) -> Path:
    """Write a page, if it is not too large to open.

    Args:
        page: Its text.
        path: The file to write; its folder is made if missing.
        way_out: What to do about a page that is too large.

    Returns:
        The written file.

    Raises:
        ValueError: If the page would be larger than 5 MB.
    """
    content = page.encode()
    if len(content) > LARGEST_PAGE:
        raise ValueError(
            f"`path` must hold a page of at most {LARGEST_PAGE / 1e6:.0f} MB, got "
            f"{len(content) / 1e6:.1f}; {way_out}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, content)


def hash_text(text: str) -> str:
    """Write a text's hash as a Content-Security-Policy does.

    Args:
        text: A style sheet or a script.

    Returns:
        `sha256-` and the hash in base64.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _read(name: str) -> str:
    """Read a file that lies beside the template."""
    return files("depthmix.pages").joinpath(name).read_text("utf-8")
