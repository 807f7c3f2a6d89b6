"""The view of a run that callbacks receive: its progress and engines, and methods to log and to request actions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from runner.engines import Engines
from runner.utils.distributed import is_rank_zero
from runner.utils.sampler.stream import is_stream
from runner.utils.train import Loop

_OWN_NAMES = ("step", "time_s")


class Run(Protocol):
    """The parts of a run that the view reads."""

    @property
    def engines(self) -> Engines: ...
    @property
    def loop(self) -> Loop: ...
    @property
    def folder(self) -> Path: ...
    @property
    def tracker(self) -> Any: ...
    @property
    def is_new(self) -> bool: ...
    def measure(self) -> dict[str, float]: ...
    def write_export(self, suffix: str, numbers: Mapping[str, float]) -> None: ...
    def training_pass(self, num_batches: int | None) -> Iterator[Any]: ...


class RunView:
    """A run as its callbacks see it.

    Modules and optimizers are the run's own: read them, and do not change them.

    Attributes:
        engines: the engines by name, with `module`, `optimizer`, `steps` and other counters.
        folder: of the run; only rank zero should write there.
        values: the training values that were logged at this step, by name; empty if none were due.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.engines: Mapping[str, Any] = run.engines
        self.folder = run.folder
        self.values: Mapping[str, float] = {}
        self._requests: list[tuple[str, str]] = []  # topics and contents of `Loop.request`
        self._hook = ""  # that runs now
        self._callback = ""  # its callback's name

    def enter(self, callback: str, hook: str) -> None:
        """Records the hook that is called next, for messages."""
        self._callback, self._hook = callback, hook

    def take_requests(self) -> list[tuple[str, str]]:
        """Returns the requests since the last call."""
        requests, self._requests = self._requests, []
        return requests

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return self._run.loop.step

    @property
    def steps(self) -> int:
        """The step after which the run ends; the current one once a stop has taken effect."""
        return self._run.loop.steps

    @property
    def is_last(self) -> bool:
        """True after the last step."""
        return self.step >= self.steps

    @property
    def is_stopping(self) -> bool:
        """True after a signal or `quit`: the run saves and ends, and waits for this hook."""
        return self._run.loop.is_stopping

    @property
    def epoch(self) -> int | None:
        """The epoch in which the next batch begins; None if the sampler does not count epochs."""
        epoch: int | None = getattr(self._run.loop.batches, "epoch", None)
        return epoch

    @property
    def samples(self) -> int:
        """The number of samples trained on, over all ranks."""
        return self._run.loop.batches.num_samples_total

    @property
    def is_resumed(self) -> bool:
        """True if this session resumed a checkpoint."""
        return not self._run.is_new

    @property
    def is_rank_zero(self) -> bool:
        """True on the rank that logs and writes files; the other ranks' logs are dropped."""
        return is_rank_zero()

    @property
    def lrs(self) -> dict[str, list[float]]:
        """The learning rates of each engine's parameter groups, by engine."""
        lrs = {}
        for name, engine in self.engines.items():
            if engine.optimizer is not None:
                lrs[name] = [float(group["lr"]) for group in engine.optimizer.param_groups]
        return lrs

    @property
    def is_stream(self) -> bool:
        """True if data.train is a stream: `training_batches` then can't make a pass over it."""
        return is_stream(getattr(self._run.loop.batches, "dataset", None))

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Logs numbers at this step, by name: Python's, or 0-d tensors and arrays.

        Raises:
            TypeError: a value is no number.
            ValueError: a name is one that each line of metrics.jsonl has, or an integer is too large for a float.
        """
        kept = {}
        for name, value in numbers.items():
            if name in _OWN_NAMES:
                raise ValueError(f"log: {name!r} is a name of metrics.jsonl's own; call the value something else")
            number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
            if not isinstance(number, int | float):
                raise TypeError(f"log: {name!r} is a {type(value).__name__}; expected a number or a 0-d tensor")
            try:
                float(number)
            except OverflowError:
                raise ValueError(f"log: {name!r} is an integer that is too large for a float") from None
            kept[str(name)] = number
        self._run.tracker.log(self.step, kept)

    def text(self, name: str, text: str) -> None:
        """Shows Markdown in TensorBoard.

        Raises:
            TypeError: it is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: {name!r} is a {type(text).__name__}; expected a text")
        self._run.tracker.text(self.step, name, text)

    def image(self, name: str, picture: Any) -> None:
        """Shows a Matplotlib figure, or a uint8 array or tensor `[height, width, 3]`, in TensorBoard."""
        self._run.tracker.image(self.step, name, picture)

    def histogram(self, name: str, values: Any) -> None:
        """Shows the histogram of an array or tensor of any shape in TensorBoard."""
        self._run.tracker.histogram(self.step, name, values)

    def request_save(self) -> None:
        """Requests a checkpoint of this step; from `on_step` with several ranks, of one of the next steps."""
        self._request("action", "save")

    def request_evaluate(self) -> None:
        """Requests an evaluation after this step; from `on_step` with several ranks, after one of the next steps."""
        if self._hook != "on_evaluate":  # else it has just been made
            self._request("action", "eval")

    def request_stop(self, reason: str) -> None:
        """Requests that this step is the run's last; from `on_step` with several ranks, one of the next steps.

        The actions of a last step follow: evaluation, export and save. The run's status is finished, and run.json has
        the reason. A request on one rank holds for all. A resume trains on, unless the callback requests it again in
        `on_start`.
        """
        self._request("end", f"callbacks.{self._callback}: {reason}")

    def _request(self, topic: str, content: str) -> None:
        if self._hook in ("on_save", "on_end"):
            raise RuntimeError(f"{self._hook}: too late for a request; make it in on_start, on_step or on_evaluate")
        self._requests.append((topic, content))

    def evaluate(self) -> dict[str, float]:
        """Returns the numbers of an evaluation of the modules as they are, by `eval/<name>`; all ranks call it.

        Nothing is logged. Without evaluation data there are no numbers.

        Raises:
            InterruptedError: the run is stopping.
        """
        return self._run.measure()

    def export(self, suffix: str, numbers: Mapping[str, float]) -> None:
        """Writes the weights as they are to `exports/<engine><suffix>.safetensors`; all ranks call it.

        Args:
            numbers: of an evaluation of these weights, for the file's metadata.
        """
        self._run.write_export(suffix, numbers)

    def training_batches(self, num_batches: int | None = None) -> Iterator[Any]:
        """Yields batches of one shuffled pass over data.train, the same on every rank.

        The run's own position stays. An incomplete last batch is left out, unless it is the only one. A mix of
        datasets is passed as their concatenation.
        """
        return self._run.training_pass(num_batches)
