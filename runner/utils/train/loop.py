"""The training loop: steps, and metrics, commands and periodic actions at their boundaries.

A *step* is one optimizer update, a *micro-step* one forward and backward. Every rank runs its own loop, and all loops
do the same at the same step: an event on one rank reaches the others through the coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runner.utils import distributed
from runner.utils.distributed import RankLostError
from runner.utils.distributed.coordinator import Coordinator, Message
from runner.utils.distributed.memory import PeakMemory
from runner.utils.files.open_files import DescriptorReserve
from runner.utils.train.failures import FailurePolicy, StepAborted, TrainingStopped, describe_failure
from runner.utils.train.protocols import BatchStream, CommandSource, EngineGroup, ProgressDisplay
from runner.utils.train.step import StepRunner, describe_faults
from runner.utils.train.throughput import Throughput
from runner.utils.utils import describe, is_signal, message_of


@dataclass(frozen=True)
class Action:
    """A periodic action: done every `every` steps and after the last; 0 disables it.

    `do` raises InterruptedError if it was interrupted because the loop is stopping: the action then stays pending.
    """

    do: Callable[[], None]
    every: int

    def is_due(self, step: int, is_last: bool) -> bool:
        """Returns whether the action is due at the boundary after `step`."""
        return self.every > 0 and (is_last or step % self.every == 0)


class Schedule:
    """Actions by name, in the order they run at a boundary, and the names of the pending ones."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = dict(actions)
        self.pending: list[str] = []

    def enqueue_due(self, step: int, is_last: bool, requested: Collection[str]) -> bool:
        """Enqueues each action that is due or requested, once; returns whether any action is pending."""
        for name, action in self.actions.items():
            if name in requested or action.is_due(step, is_last):
                self.pending.append(name)
        return bool(self.pending)

    def enqueue(self, names: Collection[str]) -> None:
        """Enqueues actions that are not pending, after the running one, and sorts those that wait."""
        order = list(self.actions)
        running, waiting = self.pending[:1], self.pending[1:]
        waiting += [name for name in names if name not in self.pending]
        self.pending = running + sorted(waiting, key=order.index)

    def run_pending(self, run_action: Callable[[str], None], is_stopping: Callable[[], bool]) -> None:
        """Runs the pending actions in order until the loop is stopping; an interrupted one stays pending."""
        while self.pending and not is_stopping():
            try:
                run_action(self.pending[0])
            except InterruptedError:
                return
            self.pending.pop(0)


class Stop(Exception):
    """Raised by a command to end the loop; its message is the reason."""


class Loop:
    """Trains for `steps` steps.

    Args:
        accumulate: micro-steps per step.
        seed: with step, micro-step and rank it seeds the random numbers of a forward.
        log_every: steps between calls of `log`; 0 for none.
        log: called as log(step, values).
        warn: called with a message about a skipped step or a failed save.
        actions: by name, in the order they run at a boundary. A loop that is stopped runs only `save` before it
            returns; its pending actions are part of its state.
        commands: handlers of commands by name, each called with this loop and the argument; one may raise `Stop`.
        queue: the commands that are due.
        policy: the reaction to failed steps.
        coordinator: of all ranks; by default one for a single process.
        check: called after each step, before it is counted, until it returns True; its error ends the loop.
        on_step: called after each step is counted and its metrics are logged, before its actions.
    Attributes:
        end_reason: why the loop ended, or is to end, before its last step as if that were done.
    """

    def __init__(
        self,
        engines: EngineGroup,
        batches: BatchStream,
        *,
        steps: int,
        accumulate: int = 1,
        seed: int = 0,
        log_every: int = 0,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
        warn: Callable[[str], None] | None = None,
        actions: Mapping[str, Action] | None = None,
        commands: Mapping[str, Callable[[Any, Any], None]] | None = None,
        queue: CommandSource | None = None,
        display: ProgressDisplay | None = None,
        policy: FailurePolicy | None = None,
        coordinator: Coordinator | None = None,
        check: Callable[[], bool] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.engines = engines
        self.batches = batches
        self.steps = steps
        self.step = 0
        self.coordinator = coordinator or Coordinator()
        self._warn = warn or (lambda text: None)
        self.step_runner = StepRunner(
            engines, batches, self.coordinator, accumulate=accumulate, seed=seed, policy=policy or FailurePolicy(),
            on_message=self._handle_message, warn=self._warn,
        )  # fmt: skip
        self._log_action = Action(self.log_metrics, log_every if log else 0)
        self._log_values = log or (lambda step, values: None)
        self.schedule = Schedule(actions or {})
        self._saved_step: int | None = None
        self._commands = dict(commands or {})
        self._requested = set[str]()  # actions that commands and requests asked for at this boundary
        self._posted: list[tuple[str, str]] = []  # this rank's requests that the other ranks have not received
        self.end_reason: str | None = None
        self._queue = queue
        self._display = display
        self._check = check
        self._on_step = on_step
        self._stop_reason: str | None = None
        self._requested_stop: str | None = None
        self._logged: dict[str, float] = {}
        self._log_names = _LogNames()
        self._peak = PeakMemory(engines.device)
        self.throughput = Throughput()
        self._reserve = DescriptorReserve()

    def stop(self, reason: str) -> None:
        """Ends the loop at the next step boundary; a second reason is ignored. A signal handler may call it.

        With several ranks it ends at the first boundary at which all ranks have received the message.
        """
        if self._requested_stop is None:
            self._requested_stop = reason
            if distributed.is_distributed():
                self.coordinator.post("stop", reason)
            else:
                self._set_stop_reason(reason)

    def _set_stop_reason(self, reason: str) -> None:
        if self._stop_reason is None:
            self._stop_reason = reason

    def _has_stop_reason(self) -> bool:
        return self._stop_reason is not None

    def _handle_message(self, message: Message) -> None:
        if message.topic == "stop":
            self._set_stop_reason(message.content)
        elif message.topic == "line" and self._queue is not None:
            self._queue.submit(message.content)
        elif message.topic in ("action", "end"):
            if message.rank == distributed.rank() and (request := (message.topic, message.content)) in self._posted:
                self._posted.remove(request)
            if message.topic == "action":
                self._requested.add(message.content)
            else:
                self.end_reason = self.end_reason or message.content
                self.steps = min(self.steps, self.step + 1)  # the step in progress is the last one

    @property
    def is_stopping(self) -> bool:
        """True once a stop was requested, before all ranks know."""
        return self._requested_stop is not None or self._stop_reason is not None

    def run(self) -> str:
        """Trains to the last step or until it is stopped; returns "finished" or the reason for the stop.

        Raises:
            TrainingStopped: training can't go on; the state was saved if it is complete.
            RankLostError: another rank is gone.
            BaseException: an error of the program; the state was saved likewise.
        """
        self.throughput.begin(*self._totals())
        self._reserve.open()
        try:
            self.schedule.run_pending(self.run_action, self._has_stop_reason)
            self.coordinator.run_on_all_ranks(bool)  # raises the errors of any rank before the first step
            while self.step < self.steps and self._stop_reason is None:
                self.step_runner.run(self.step, self._has_stop_reason, self.step + 1 >= self.steps)
                if self._check is not None:
                    self.coordinator.defer_error(self._check_once)
                self.step += 1
                self._finish_step()
                if self.step_runner.stop_reason is not None:
                    raise TrainingStopped(self.step_runner.stop_reason)
            self.coordinator.run_on_all_ranks(bool)  # raises errors that were deferred after the last step
        except StepAborted:
            pass
        except BaseException as error:
            if is_signal(error):
                raise
            if isinstance(error, RankLostError) and not self.coordinator.is_disconnected:
                self.coordinator.abort_reason(error)
            if self.coordinator.is_disconnected:
                self._save_disconnected()
                raise
            reason = describe_failure(error, f"after step {self.step}", self.engines.device)
            if reason is None or self._stop_reason is None:
                self._save_after_error(error)
                if reason is None:
                    raise
                raise TrainingStopped(reason) from error
        finally:
            self._reserve.close()
        if self._stop_reason is None:
            return "finished"
        self._save_stopped()
        return self._stop_reason

    def _check_once(self) -> None:
        assert self._check is not None
        if self._check():
            self._check = None

    def _save_after_error(self, error: BaseException) -> None:
        """Saves the state after the last completed step when an error ends the loop, if that state is complete.

        An error of the save is only reported: it must not hide the first error.
        """
        if not self.step_runner.is_complete or (isinstance(error, TrainingStopped) and not error.is_complete):
            return
        try:
            self._save_last()
        except BaseException as save_error:
            if is_signal(save_error) or isinstance(save_error, RankLostError):
                raise
            if message_of(error) not in message_of(save_error):
                self._warn(f"The state of step {self.step} can't be saved: {describe(save_error)}")

    def _save_disconnected(self) -> None:
        """Saves on rank zero alone, when the ranks are disconnected and rank zero has the complete state."""
        is_unsaved = "save" in self.schedule.actions and self._saved_step != self.step
        has_state = not self.coordinator.is_sharded and self.step_runner.is_complete
        if not (is_unsaved and has_state and distributed.is_rank_zero()):
            return
        self._reserve.close()
        try:
            if faults := self.engines.find_late_faults(is_alone=True):
                raise TrainingStopped(describe_faults(faults))
            self.schedule.actions["save"].do()
        except Exception as error:
            self._warn(f"The state of step {self.step} can't be saved: {describe(error)}")

    def _save_stopped(self) -> None:
        try:
            self._save_last()
        except BaseException as error:
            if not is_signal(error) and not isinstance(error, RankLostError):
                self._save_after_error(error)  # a second attempt may succeed
            raise

    def _save_last(self) -> None:
        self._reserve.close()
        if "save" not in self.schedule.actions:
            return
        saved = self.coordinator.run_on_all_ranks(lambda: self._saved_step)
        if any(step != self.step for step in saved):
            self.run_action("save")
            self.coordinator.run_on_all_ranks(bool)  # raises the save's error on any rank

    def _finish_step(self) -> None:
        step = self.step
        if self._log_action.is_due(step, step >= self.steps):
            self.coordinator.defer_error(self._log_action.do)
        if self._on_step is not None:
            self._call_on_step(self._on_step)
        is_last = step >= self.steps
        if self._display is not None:
            self._display.update(step, self._logged)
        if self._queue is not None:
            for command in self._queue.due(step):
                try:
                    self._commands[command.name](self, command.argument)
                except Stop as stop:
                    self._set_stop_reason(str(stop))  # all ranks have received this command
        if self.schedule.enqueue_due(step, is_last, self._requested):
            self._requested.clear()
            self.schedule.run_pending(self.run_action, self._has_stop_reason)
        is_last = step >= self.steps  # an action may have ended the loop
        error = self.coordinator.deferred_error
        if error is None or is_last or self._stop_reason is not None or self.step_runner.stop_reason is not None:
            return  # an error that no step follows is exchanged at the end of the loop
        # The other ranks receive the error in their next step.
        self.coordinator.deferred_error = None
        self.engines.begin_step(step)
        self.step_runner.share_failure(error, describe_failure(error, f"after step {step}", self.engines.device))
        raise error

    def _call_on_step(self, on_step: Callable[[], None]) -> None:
        try:
            self.coordinator.defer_error(on_step)
        except BaseException:
            self.schedule.enqueue_due(self.step, self.step >= self.steps, self._requested)  # a resume runs them
            raise

    def run_action(self, name: str) -> None:
        """Runs an action now; its time does not count as training."""
        began = time.perf_counter()
        if name == "save":
            self._check_deferred_faults()
            self.coordinator.run_on_all_ranks(bool)  # raises deferred errors before a state is saved
        try:
            self.coordinator.defer_error(self.schedule.actions[name].do)
        except InterruptedError:
            # Only the interrupted rank may know the reason: the messages bring it to all.
            for message in self.coordinator.exchange():
                self._handle_message(message)
            raise
        if name == "save" and self.coordinator.deferred_error is None:
            self._saved_step = self.step
        self.throughput.pause(time.perf_counter() - began)

    def request_action(self, name: str) -> None:
        """Requests an action at this boundary, for the handler of a command; actions keep their order there."""
        self._requested.add(name)

    def request(self, topic: str, content: str) -> None:
        """Requests an action by name (topic "action") or the end of the loop for a reason ("end") on all ranks.

        On one process an action runs at this boundary, and this step is the last one. With several ranks, that holds
        for the first boundary after all have received the request, a step or two later.
        """
        if distributed.is_distributed():
            self._posted.append((topic, content))
            self.coordinator.post(topic, content)
        elif topic == "action":
            self._requested.add(content)
        else:
            self.end_reason = self.end_reason or content
            self.steps = min(self.steps, self.step)

    def end_now(self, reason: str, *, in_action: bool) -> None:
        """Makes the step that is done the last one; all ranks call it.

        Args:
            in_action: an action calls it, after which the actions of a last step follow. False before `run`, which
                then does pending actions alone.
        """
        self.end_reason = self.end_reason or reason
        self.steps = min(self.steps, self.step)
        if in_action:
            due = [name for name, action in self.schedule.actions.items() if action.is_due(self.step, is_last=True)]
            self.schedule.enqueue(due)

    def _check_deferred_faults(self) -> None:
        if faults := self.engines.find_late_faults():
            raise TrainingStopped(
                f"Up to step {self.step} something went wrong. {describe_faults(faults)}: go on from the last "
                "checkpoint, and skip such steps to have their gradients checked before the update",
                is_complete=False,
            )

    def log_metrics(self) -> None:
        """Logs the metrics, throughput and memory use of the steps since the last call."""
        self._check_deferred_faults()
        metrics = self.engines.take_metrics()
        metrics.update(self.throughput.measure(*self._totals()))
        metrics["memory_gb"] = self._peak.read_gb()
        log_names = self._log_names
        self._logged = {log_names[name]: value for name, value in metrics.items()}
        self._log_values(self.step, self._logged)

    def _totals(self) -> tuple[int, int, int]:
        return self.step, self.batches.num_samples_total, self.engines.tokens

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of completed and of skipped steps, the pending actions, and requests on their way."""
        # A pending save is the one that calls this, unless other actions wait with it.
        pending = [] if set(self.schedule.pending) <= {"save"} else list(self.schedule.pending)
        state = {"step": self.step, "skipped": self.step_runner.num_skipped, "owed": pending}
        return state | ({"requests": [list(request) for request in self._posted]} if self._posted else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after the completed steps."""
        self.step = int(state["step"])
        self.step_runner.num_skipped = int(state["skipped"])
        self.schedule.pending = list(state["owed"])
        self._saved_step = self.step
        for topic, content in state.get("requests", ()):
            if distributed.is_distributed():
                self.request(topic, content)
            else:
                self._handle_message(Message(0, topic, content))


class _LogNames(dict[str, str]):
    """The names of metrics in the log, by their own names, each made once."""

    def __missing__(self, name: str) -> str:
        self[name] = f"train/{name}"
        return self[name]
