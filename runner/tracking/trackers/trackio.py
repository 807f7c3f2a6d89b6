"""Logs a run to trackio, a local database with a dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.tracking.media import read_wave, to_pil
from runner.tracking.protocol import RunInfo, require_package


class Trackio:
    """Logs a run to trackio, whose run is named after the folder of the run and its id.

    A resumed run goes on as the same run of trackio, which can't be truncated: it has two rows of a step that is
    repeated.

    Args:
        project: of trackio.
        space_id: of a Hugging Face Space that shows the run; null: the local database, in TRACKIO_DIR.
        timeout_s: seconds that the end of a run waits for the last numbers.
    Raises:
        ImportError: trackio is not installed.
    """

    remedy = "`trackio show` shows what it has"

    def __init__(self, project: str, space_id: str | None = None, timeout_s: float = 40.0) -> None:
        require_package("trackio", "trackio")
        self.timeout_s = timeout_s
        self._project = project
        self._space_id = space_id
        self._name = ""
        self._run: Any = None

    def open(self, run: RunInfo) -> None:
        self._name = f"{run.folder.name}-{run.id}" if run.id else run.folder.name

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> None:
        self._init({name.lstrip("_"): value for name, value in values.items()})

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._init({}).log({**numbers, "time_s": time_s}, step=step)

    def text(self, step: int, time_s: float, name: str, text: str) -> None:
        import trackio

        self._init({}).log({name: trackio.Markdown(text)}, step=step)

    def image(self, step: int, time_s: float, name: str, picture: Any) -> None:
        import trackio

        self._init({}).log({name: trackio.Image(to_pil(picture))}, step=step)

    def audio(self, step: int, time_s: float, name: str, wav: bytes, sample_rate: int) -> None:
        import trackio

        self._init({}).log({name: trackio.Audio(read_wave(wav), sample_rate=sample_rate)}, step=step)

    def close(self, status: str | None) -> None:
        if self._run is not None:
            self._run.finish()

    def _init(self, config: dict[str, Any]) -> Any:
        """Returns trackio's run; the first call begins it, because it takes the hyperparameters then."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project,
                name=self._name,
                space_id=self._space_id,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self._run
