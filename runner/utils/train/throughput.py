"""Throughput: seconds per step, samples and tokens per second."""

from __future__ import annotations

import time


class Throughput:
    """Measures the time of steps; time reported to `pause` does not count in `measure`."""

    def __init__(self) -> None:
        self.begin(0, 0, 0)

    def begin(self, step: int, samples: int, tokens: int) -> None:
        """Starts the clock, with the totals of a resumed run."""
        self._started = self._last_time = time.perf_counter()
        self._first_step = step
        self._last = step, samples, tokens

    def pause(self, seconds: float) -> None:
        """Excludes seconds that were not spent on training."""
        self._last_time += seconds

    def measure(self, step: int, samples: int, tokens: int) -> dict[str, float]:
        """Returns seconds per step, samples and tokens per second since the last call."""
        now = time.perf_counter()
        last_step, last_samples, last_tokens = self._last
        seconds = now - self._last_time
        if seconds <= 0.0:
            seconds = 1e-9
        rates = {
            "step_time_s": seconds / ((step - last_step) or 1),
            "samples_per_s": (samples - last_samples) / seconds,
        }
        if tokens:
            rates["tokens_per_s"] = (tokens - last_tokens) / seconds
        self._last_time = now
        self._last = step, samples, tokens
        return rates

    def overall(self, step: int) -> tuple[float, float]:
        """Returns the seconds since `begin`, and the seconds per step since then."""
        elapsed_s = time.perf_counter() - self._started
        return elapsed_s, elapsed_s / max(step - self._first_step, 1)
