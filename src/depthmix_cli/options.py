"""What several commands take, and no function of the library, with the help that they show."""

from typing import Annotated

from cyclopts import Parameter

Options = dict[str, str]
"""Options of a section, written with a dot on the command line."""

Model = Annotated[
    str, Parameter(help="Output folder of a training run, or a model as `model.name` takes it.")
]

Generation = Annotated[
    Options | None,
    Parameter(
        help="All options of transformers' `GenerationConfig`, with a dot: "
        "`--generation.max-new-tokens 64`, `--generation.temperature 0.7`.",
    ),
]

SPEC = "depthmix.models.spec:ModelSpec"
"""Where it is said what can be said of a model beside its name."""
