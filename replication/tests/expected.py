"""The paper's experiments, and what of them tests ask for."""

from depthmix.data.catalog import describe
from depthmix_replication.experiment_files import load_experiment
from depthmix_replication.trials import expand

PAPER = ("table1", "table2", "table3", "table4", "fig1", "fig2")
PAPER += tuple(f"fig{number}" for number in range(4, 9))
"""Tables and figures of the paper."""


def load_split_files(name, split="test"):
    """The files of a split, and of the training split, by their place in a local folder."""
    data_set = describe(name)
    splits = (data_set.aliases.get(split, split), "train")
    return [file.path for part in splits for file in data_set.splits[part].files]


def trials_of(name, scale="small", **options):
    """The trials of an experiment, for a model of 30 layers."""
    experiment = load_experiment(name, scale)
    return expand(experiment, scale, count_layers=lambda _: 30, **options)
