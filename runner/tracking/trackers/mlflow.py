"""Logs a run to MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.tracking.media import to_pil
from runner.tracking.protocol import RunInfo, require_package

_RUN_TAG = "runner.id"
_MAX_BATCH = 900  # metrics; a request of MLflow has up to 1000
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a parameter
_STATUSES = {"finished": "FINISHED", "quit": "FINISHED", "failed": "FAILED"}


class Mlflow:
    """Logs a run to MLflow: numbers as metrics, hyperparameters as parameters, texts and pictures as artifacts.

    A resumed run goes on as the same run of MLflow, which is found by its tag `runner.id`. MLflow can't be truncated:
    it has two values of a step that is repeated, and shows the later one as the latest. It stores no infinities: its
    database keeps the largest number instead.

    Args:
        experiment: of MLflow, made if there is none.
        tracking_uri: of a server or database, such as sqlite:////home/me/mlflow.db; null: MLFLOW_TRACKING_URI, or
            MLflow's own default.
        timeout_s: seconds that the end of a run waits for the last requests.
    Raises:
        ImportError: mlflow is not installed.
    """

    remedy = "check trackers.mlflow.tracking_uri"

    def __init__(self, experiment: str, tracking_uri: str | None = None, timeout_s: float = 30.0) -> None:
        require_package("mlflow", "mlflow")
        self.timeout_s = timeout_s
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._client: Any = None
        self._run_id = ""
        self._metrics: list[Any] = []
        self._clock_zero = 0.0

    def open(self, run: RunInfo) -> None:
        from mlflow import MlflowClient

        self._clock_zero = run.clock_zero
        self._client = client = MlflowClient(self._tracking_uri)
        experiment = client.get_experiment_by_name(self._experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
        found = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run.id}'") if run.id else []
        if found:
            self._run_id = found[0].info.run_id
            client.set_terminated(self._run_id, "RUNNING")
        else:
            tags = {_RUN_TAG: run.id, "runner.folder": str(run.folder.absolute())}
            self._run_id = client.create_run(experiment_id, run_name=run.folder.name, tags=tags).info.run_id

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        milliseconds = int((self._clock_zero + time_s) * 1000)
        self._metrics += [Metric(_key(name), float(value), milliseconds, step) for name, value in numbers.items()]
        while len(self._metrics) >= _MAX_BATCH:
            self._send()

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> None:
        """Logs parameters; MLflow does not let one change, so a resumed run keeps its first value."""
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        params = [Param(_key(name), str(value)[:_MAX_VALUE]) for name, value in values.items()]
        params = [param for param in params if param.key not in known]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def text(self, step: int, time_s: float, name: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{_key(name)}/{step:08d}.txt")

    def image(self, step: int, time_s: float, name: str, picture: Any) -> None:
        self._client.log_image(self._run_id, to_pil(picture), f"{_key(name)}/{step:08d}.png")

    def write(self) -> None:
        while self._metrics:
            self._send()

    def close(self, status: str | None) -> None:
        if self._run_id:
            self._client.set_terminated(self._run_id, _STATUSES.get(status or "failed", "KILLED"))

    def _send(self) -> None:
        self._client.log_batch(self._run_id, metrics=self._metrics[:_MAX_BATCH])
        del self._metrics[:_MAX_BATCH]


def _key(name: str) -> str:
    """Returns a name with the characters that MLflow permits."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "_-. :/") else "_" for char in name)[:250]
