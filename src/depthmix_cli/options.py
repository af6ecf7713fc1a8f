"""What several commands take, with the help that all of them show."""

from typing import Annotated, Literal

from cyclopts import Parameter

Options = dict[str, str]
"""Options of a section, written with a dot on the command line."""

Model = Annotated[
    str, Parameter(help="Output folder of a training run, or a model as `model.name` takes it.")
]

Adapter = Annotated[
    str | None, Parameter(help="Folder of an adapter, where `model` is not one itself.")
]

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Parameter(help="Type of the weights in memory."),
]

TopK = Annotated[
    int | None,
    Parameter(
        help="Layers of the mixture that vote per token, fewer than it was trained with.",
    ),
]

Generation = Annotated[
    Options | None,
    Parameter(
        help="All options of transformers' `GenerationConfig`, with a dot: "
        "`--generation.max-new-tokens 64`, `--generation.temperature 0.7`.",
    ),
]
