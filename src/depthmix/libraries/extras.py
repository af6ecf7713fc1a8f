"""What the extras bring, and one sentence where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "lab": (
        "trl",
        "datasets",
        "pydantic",
        "cyclopts",
        "pooch",
        "yaml",
        "gguf",
        "psutil",
        "scipy",
        "matplotlib",
        "matplotlib_venn",
        "jinja2",
        "rich",
        "tqdm",
    ),
    "eval": ("lm_eval", "math_verify"),
    "judge": ("openai",),
}
"""The modules that each extra brings, of those that the package imports."""


class MissingExtraError(RuntimeError, ImportError):
    """What was asked for needs packages that an extra of depthmix brings."""


def require(extra: str, what: str, *modules: str) -> None:
    """Refuse what needs an extra that is not installed. Nothing is imported.

    Args:
        extra: Name of the extra.
        what: Who needs it, as the subject of a sentence: "A benchmark", "`depthmix.training`".
        modules: Those of the extra's modules that it needs; by default all.

    Raises:
        MissingExtraError: If modules cannot be found; it names all of them.
    """
    missing = [name for name in modules or EXTRAS[extra] if find_spec(name) is None]
    if missing:
        names = ", ".join(name.replace("_", "-") for name in missing)
        be = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{what} needs {names}, which {be} not installed: run `pip install "
            f"'depthmix[{extra}]'`."
        )
