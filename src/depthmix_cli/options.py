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
        help="All options of transformers' `GenerationConfig`: `--max-new-tokens 64`, "
        "`--temperature 0.7`; with a dot those that the command has itself, too: "
        "`--generation.top-k 50`.",
    ),
]

SPEC = "depthmix.models.spec:ModelSpec"
"""Where it is said what can be said of a model beside its name."""
