"""What the clock says of steps: since the last look, and since the loop began. Imports the standard library alone."""

from __future__ import annotations

import time


class Throughput:
    """Times steps; what is done between them, told by `pause`, does not count in `look`."""

    def __init__(self) -> None:
        self.begin(0, 0, 0)

    def begin(self, step: int, samples: int, tokens: int) -> None:
        """The loop begins, so many steps, samples and tokens being done."""
        self._started, self._first_step = time.perf_counter(), step
        self._restart(self._started, step, samples, tokens)

    def _restart(self, now: float, step: int, samples: int, tokens: int) -> None:
        self._last = now, step, samples, tokens
        self._paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """So much time went into something else than training."""
        self._paused_s += seconds

    def measure(self, step: int, samples: int, tokens: int) -> dict[str, float]:
        """Returns seconds a step, samples and tokens a second since the last look."""
        now = time.perf_counter()
        then, first_step, first_samples, first_tokens = self._last
        seconds = max(now - then - self._paused_s, 1e-9)
        found = {
            "step_time_s": seconds / max(step - first_step, 1),
            "samples_per_s": (samples - first_samples) / seconds,
        }
        if tokens:
            found["tokens_per_s"] = (tokens - first_tokens) / seconds
        self._restart(now, step, samples, tokens)
        return found

    def overall(self, step: int) -> tuple[float, float]:
        """Returns seconds since the loop began, and seconds a step since then."""
        elapsed_s = time.perf_counter() - self._started
        return elapsed_s, elapsed_s / max(step - self._first_step, 1)
