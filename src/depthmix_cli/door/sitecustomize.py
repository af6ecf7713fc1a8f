"""What Python runs as it starts under `depthmix run`: lets depthmix in behind PEFT.

The folder of this file stands in PYTHONPATH, and so does it for child processes. Nothing is
imported before PEFT is, and nothing of depthmix in processes that do without PEFT. A
`sitecustomize` of the environment's own runs as it would have.
"""

import importlib.machinery
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
"""Folder of this file."""


class Door(MetaPathFinder):
    """Lets depthmix in behind PEFT."""

    def find_spec(self, fullname, path=None, target=None):
        """Find PEFT where others find it, and have more done when it has been imported."""
        if fullname != "peft":
            return None
        # It may be looked for long before it is imported: libraries ask whether it is there.
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = Behind(spec.loader)
                return spec
        return None


class Behind:
    """Loads PEFT as its own loader does, and then depthmix, which tells PEFT of the method.

    Args:
        loader: PEFT's own.
    """

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        """Leave it to PEFT's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """Load PEFT, and depthmix behind it."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            importlib.import_module("depthmix.adapters")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "depthmix":
                raise
            raise ModuleNotFoundError(
                f"`depthmix run` started {sys.executable}, in whose environment depthmix is not "
                "installed, so that PEFT would not know a run there; install depthmix in it, or "
                "name the command of the environment that has it."
            ) from error


def run_the_next() -> None:
    """Run the `sitecustomize` that Python would have run without this one."""
    rest = [place for place in sys.path if str(Path(place or ".").resolve()) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, Door())
run_the_next()
