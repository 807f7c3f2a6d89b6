"""The allowed values of the settings of recomputed blocks; without torch, so that a config is checked early."""

from runner.utils.utils import check_choice

OFFLOADS = ("auto", "always", "never")
_LEAST = {"every": 1, "in_flight": 1, "keep_last": 0, "prefetch": 0, "min_bytes": 0, "host_limit": 0}


def check_settings(offload: str = "auto", **numbers: int | None) -> None:
    """Checks the settings of `unsloth.apply`; None for a number means no limit.

    Raises:
        ValueError: an unknown `offload`, or numbers out of range.
    """
    check_choice("offload", offload, OFFLOADS)
    wrong = [
        f"{name}={value}: expected {_LEAST[name]} or more"
        for name, value in numbers.items()
        if value is not None and value < _LEAST[name]
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
