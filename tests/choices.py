"""Runs of the runner's own choices, on one rank or on two, and their comparison with interrupted ones."""

import sys

from chaos import find_difference
from conftest import Project, read_numbers, shared_zygote
from ranks import Ranks

from runner.checkpoint import checkpoints
from runner.checkpoint.checkpoints import FACTS


class Choices(Project):
    """Runs of the runner's own choices."""

    command = property(lambda self: [sys.executable, "-m", "runner"])
    loaded = ("runner.examples.source_code", "sklearn.datasets", "matplotlib.figure")

    def run_on(self, count, *overrides, typed=None, status=0, by_rank=None):
        """Runs to the end on so many ranks.

        Args:
            by_rank: variables of the environment of a rank, on several ranks.
        """
        if count == 1:
            return self.run(*overrides, typed=typed, status=status)
        ranks = Ranks(shared_zygote(*self.loaded))
        return ranks.run(self.folder, count, *overrides, typed=typed, status=status, by_rank=by_rank)


def load_parts(run, step):
    """Returns weights and states of all engines in a checkpoint, by the names of their files."""
    parts = checkpoints.load(run / "checkpoints" / f"step_{step:08d}")
    return {name: part for name, part in parts.items() if name != FACTS}


def assert_same_parts(run, other, step):
    parts, other_parts = load_parts(run, step), load_parts(other, step)
    assert parts.keys() == other_parts.keys()
    for name, part in parts.items():
        assert find_difference(part, other_parts[name]) is None, name


def assert_resumes_exactly(project, count, steps, *overrides):
    """Checks that a run that is interrupted after its second step and resumed equals an uninterrupted one."""
    project.run_on(count, *overrides, "hydra.run.dir=whole")
    project.run_on(count, *overrides, "hydra.run.dir=cut", typed="quit@2\n")
    project.run_on(count, "resume=cut")
    assert_same_parts(project.folder / "whole", project.folder / "cut", steps)
    assert read_numbers(project.folder / "whole") == read_numbers(project.folder / "cut")
