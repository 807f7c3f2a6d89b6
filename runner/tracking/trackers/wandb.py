"""Logs a run to Weights & Biases."""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from runner.tracking.media import read_wave, to_pil
from runner.tracking.protocol import RunInfo, require_package

_FAILURES = ("failed", "crashed")


class Wandb:
    """Logs a run to W&B, whose steps are those of the run. Its files are in the folder `wandb` of the run.

    A resumed run goes on as the same run of W&B. W&B can't be truncated: it keeps what it has of repeated steps and
    ignores the repetition.

    Args:
        project: of the run; null: W&B's own default.
        entity: a user or team; null: W&B's own default.
        mode: online, offline (`wandb sync` uploads the folder later) or disabled; null: WANDB_MODE decides, or online.
        group: of runs that are shown together.
        tags: of the run.
        timeout_s: seconds that the end of a run waits for the upload.
    Raises:
        ImportError: wandb is not installed.
        ValueError: there is no such mode.
    """

    remedy = "sync the folder wandb of the run with `wandb sync`, or set trackers.wandb.mode=offline"

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> None:
        require_package("wandb", "wandb")
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"mode={mode}: expected online, offline, disabled or null")
        self.timeout_s = timeout_s
        self._mode: Any = mode
        self._options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags) or None,
        }
        self._run: Any = None
        self._first_step = 0  # earlier ones are in W&B already
        self._hooks: Any = None  # sys.exit and sys.excepthook, unless W&B was in use before

    def open(self, run: RunInfo) -> None:
        import wandb

        if (run.folder / "wandb").is_symlink():
            raise OSError(f"{run.folder / 'wandb'} is a link, expected a folder")
        if not _is_wandbs(sys.exit):
            self._hooks = sys.exit, sys.excepthook
        wandb.setup()  # reads settings files, and those of the run's folder are not to be read
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt has what is printed
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            x_save_requirements=False,
            root_dir=str(run.folder),
        )
        if self._mode in (None, "online") and not _is_offline(wandb) and not wandb.login(prompt=False):
            raise RuntimeError("there is no API key: run `wandb login`, or set WANDB_API_KEY")
        self._run = wandb.init(
            **self._options,
            mode=self._mode,
            id=run.id or None,
            name=run.folder.name,
            dir=str(run.folder),
            resume="allow" if run.id else None,
            reinit="create_new",
            settings=settings,
        )
        self._first_step = self._run.step

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        if step >= self._first_step:
            self._run.log({**numbers, "time_s": time_s}, step=step)

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def text(self, step: int, time_s: float, name: str, text: str) -> None:
        import wandb

        self._show(step, name, wandb.Html(f"<pre>{html.escape(text)}</pre>"))

    def image(self, step: int, time_s: float, name: str, picture: Any) -> None:
        import wandb

        self._show(step, name, wandb.Image(to_pil(picture)))

    def audio(self, step: int, time_s: float, name: str, wav: bytes, sample_rate: int) -> None:
        import wandb

        self._show(step, name, wandb.Audio(read_wave(wav), sample_rate=sample_rate))

    def histogram(self, step: int, time_s: float, name: str, histogram: Any) -> None:
        import wandb

        self._show(step, name, wandb.Histogram(np_histogram=(histogram.counts, histogram.edges)))

    def close(self, status: str | None) -> None:
        try:
            if self._run is not None:
                self._run.finish(exit_code=int(status is None or status in _FAILURES))
        finally:
            self._end_service()

    def _show(self, step: int, name: str, medium: Any) -> None:
        if step >= self._first_step:
            self._run.log({name: medium}, step=step)

    def _end_service(self) -> None:
        """Ends W&B's process and takes back its hooks, unless the user's own code used W&B before."""
        if self._hooks is None:
            return
        with suppress(Exception):
            sys.modules["wandb"].teardown()
        exit_, excepthook = self._hooks
        if _is_wandbs(sys.exit):
            sys.exit = exit_
        if _is_wandbs(sys.excepthook):
            sys.excepthook = excepthook


def _is_wandbs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("wandb.")


def _is_offline(wandb: Any) -> bool:
    """Returns whether the environment or W&B's own settings switch the upload off."""
    return str(wandb.setup().settings.mode) not in ("online", "shared", "run")
