"""The figures of a benchmark with their goals, printed and written as they are measured, and its time budget."""

import json
import os
import time
from pathlib import Path


class Figures:
    """Tables of figures. Each new figure is written at once, so that a run that is killed keeps those before it.

    Args:
        path: the JSON file; None only prints.
    """

    def __init__(self, path=None):
        self._path = None if path is None else Path(path)
        self._figures = []
        self._skipped = []

    def add(self, table, row, column, value, unit="", at_most=None, at_least=None):
        """Adds the figure at a row and column of a table; `value` is a number or a text such as `out of memory`."""
        figure = {"table": table, "row": row, "column": column, "value": value, "unit": unit}
        if at_most is not None:
            figure |= {"goal": f"at most {at_most}", "is_met": isinstance(value, (int, float)) and value <= at_most}
        if at_least is not None:
            figure |= {"goal": f"at least {at_least}", "is_met": isinstance(value, (int, float)) and value >= at_least}
        self._figures.append(figure)
        print(f"{table} | {row} | {describe(figure)}", flush=True)
        self._write()

    def skip(self, name, reason):
        """Records a part that was not measured, and the reason."""
        self._skipped.append({"name": name, "reason": reason})
        print(f"{name}: skipped, {reason}", flush=True)
        self._write()

    def _write(self):
        if self._path is None:
            return
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(json.dumps({"figures": self._figures, "skipped": self._skipped}, indent=1))
        os.replace(part, self._path)


def describe(figure):
    """Returns a figure as text: `step time 1.013 x (goal: at most 1.02, met)`."""
    return f"{figure['column']} {describe_value(figure)}"


def describe_value(figure):
    """Returns a figure's value as text, with its unit and goal."""
    value = figure["value"]
    text = value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    text = f"{text} {figure['unit']}".rstrip()
    if "goal" in figure:
        text += f" (goal: {figure['goal']}, {'met' if figure['is_met'] else 'MISSED'})"
    return text


class BudgetSpentError(Exception):
    """No time is left for a measurement; the message is the reason for skipping it."""


class Budget:
    """The time budget of a benchmark in seconds, from its creation."""

    def __init__(self, seconds):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self):
        """Returns the remaining seconds."""
        return self._end - time.monotonic()

    def check(self, needed_s=0.0):
        """Raises BudgetSpentError if less than `needed_s` seconds are left."""
        left_s = self.left()
        if left_s <= 0:
            raise BudgetSpentError(f"the budget of {self.seconds:g} s is spent")
        if left_s < needed_s:
            told = f"about {needed_s:.0f} s needed, {left_s:.0f} s left"
            raise BudgetSpentError(f"the budget of {self.seconds:g} s is nearly spent: {told}")
