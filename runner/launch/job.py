"""The job that a launcher sends to the processes of a run, through a file or torch's store.

It is encoded as a message, not pickled: other programs may reach the store, and reading a message executes nothing.
"""

from __future__ import annotations

import contextlib
import math
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner.config import checks, hparams, run_folder
from runner.config.composition.expansion import walk
from runner.config.errors import ConfigError, shown
from runner.config.spec import ExperimentSpec
from runner.config.trust import import_path, signature
from runner.config.trust.signature import Origin, SignatureError
from runner.utils.files import make_folder_below, message, replace_file

if TYPE_CHECKING:
    from torch.distributed import Store

    from runner.launch.environment import ProcessEnvironment


MISTAKE_NAME = "mistake"  # the file in the launcher's folder with a worker's message of a mistake in the config


class JobError(ConfigError):
    """A job was expected, and something else received. Each process that receives it reports it."""


@dataclass
class Job:
    """One run: the specification of its experiment, its folder, and the circumstances of its start.

    `files` are those of `.hydra/`, with the content that Hydra would write. With `is_restart` the folder may hold the
    run already: it then resumes from its newest checkpoint. `origin` is where this user has started the run; it is
    empty for a resumed untrusted run, which stays unsigned. A failure of a sweep's job is one line on the screen.
    `hparams` are the hyperparameters that TensorBoard shows.
    """

    spec: ExperimentSpec
    folder: Path
    files: dict[str, bytes]
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    python_path: list[str] = field(default_factory=list)  # directories of the user's modules
    origin: dict[str, Any] = field(default_factory=dict)
    is_restart: bool = False
    is_sweep_job: bool = False
    is_unclaimed: bool = False  # the first rank makes the folder
    is_folder_fixed: bool = False  # that folder, and none with a number behind its name
    launch_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    hparams: dict[str, Any] = field(default_factory=dict)

    @property
    def links(self) -> dict[str, str]:
        """The target folders of links in its folder that may be followed, by the links' names."""
        return dict(self.origin.get("links", {}))

    @property
    def has_file_store(self) -> bool:
        """True if its processes, all on this machine, share a store in the launcher's folder, and open no port."""
        return self.spec.distributed.rdzv_endpoint is None

    def encode(self) -> bytes:
        """Returns the job as a message.

        Raises:
            ConfigError: naming the key of an object in the config, such as a resolver returns.
        """
        plain = self.spec.plain
        try:
            return message.encode({**vars(self), "spec": plain})
        except TypeError:
            for key, value in _find_objects(plain):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                expected = "expected a text, number, list or mapping, which can be sent to the run's other processes"
                raise ConfigError(f"{key}: {expected}; found a {kind}; make it of these where it is used") from None
            raise

    @classmethod
    def decode(cls, data: bytes) -> Job:
        """Returns the job that `encode` made a message of.

        Raises:
            JobError: the message is of another program, or of another version of this one.
        """
        return _check(_decode(data))

    def write_config(self) -> None:
        """Writes `.hydra/` of the run's folder, each file atomically, and signs it.

        Beside the config it records the structure of the weights files that the models were built from.
        """
        folder = self.folder / ".hydra"
        make_folder_below(folder, self.folder)
        files = {f"{name}.yaml": text for name, text in self.files.items()}
        if self.spec.resume is None:
            from runner.run.weights.placeholders import RECORD_NAME, record_weights_files  # imports torch

            content = record_weights_files(self.spec.plain, folder / RECORD_NAME)
            files |= {} if content is None else {RECORD_NAME: content}
        if self.origin:
            try:
                signature.sign(self.folder, signature.Origin(**self.origin), files)
            except (OSError, SignatureError) as error:
                effect = "resume, evaluate and export will not know it as yours"
                remedy = "set XDG_STATE_HOME to a folder of yours"
                print(f"The run can't be signed: {error}; {effect}; {remedy}", file=sys.stderr)
        for name, text in files.items():
            replace_file(folder / name, [text])


def _find_objects(config: Any) -> Iterator[tuple[str, Any]]:
    """Yields key and value of everything in a config that a message can't hold."""
    for path, value in walk(config):
        if not isinstance(value, (dict, list, tuple)):
            try:
                message.encode(value)
            except TypeError:
                yield ".".join(map(str, path)), value


def _decode(data: bytes) -> Any:
    try:
        return message.decode(data)
    except ValueError as error:
        raise _error(f"no message ({error})") from error


def _check(values: Any) -> Job:
    """Returns the job with the values of a message, which must be of its fields and of their types."""
    types = {**get_type_hints(Job), "spec": dict[str, Any]}
    if not isinstance(values, dict):
        raise _error(f"a {type(values).__name__}")
    if values.keys() != types.keys():
        raise _error(f"the keys {', '.join(map(repr, values))}")
    for name, value in values.items():
        if not _is_instance(value, types[name]):
            raise _error(f"{name}={value!r}")
    try:
        return Job(**{**values, "spec": ExperimentSpec.from_plain(values["spec"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise _error(f"another specification ({error!r})") from error


def _is_instance(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type such as `dict[str, bytes]`."""
    if hint is Any:
        return True
    if not isinstance(value, get_origin(hint) or hint):
        return False
    if isinstance(value, dict):
        key_hint, child_hint = get_args(hint)
        return all(_is_instance(key, key_hint) and _is_instance(child, child_hint) for key, child in value.items())
    return all(_is_instance(child, get_args(hint)[0]) for child in value) if isinstance(value, list) else True


def _error(found: str) -> JobError:
    return JobError(
        f"job: expected a run as rank 0 composed it, found {shown(found)}; start all ranks with the same version "
        "of the runner, at an address that no other program uses"
    )


def make_job(
    cfg: DictConfig,
    folder: Path,
    origin: Origin | None,
    *,
    is_restart: bool = False,
    resumed: Path | None = None,
    is_sweep_job: bool = False,
) -> Job:
    """Returns the job that Hydra runs now; nothing in it needs Hydra any more.

    Args:
        origin: where this user has started the run; None for an untrusted one.
        resumed: the folder of the run to resume. It keeps its hydra.yaml, and `${hydra:...}` reads that file.
    """
    hydra_config: Any = HydraConfig.instance().cfg
    contents = {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.hydra.overrides.task}
    files = {name: OmegaConf.to_yaml(content).encode() for name, content in contents.items()}
    if resumed is not None and (resumed / ".hydra" / "hydra.yaml").is_file():
        del files["hydra"]
    with run_folder.recorded_hydra_config(resumed, cfg) if resumed else contextlib.nullcontext():
        spec = ExperimentSpec.from_plain(checks.to_plain(cfg))
    return Job(
        spec,
        folder.absolute(),
        files,
        python_path=import_path.list_own(),
        origin=asdict(origin) if origin else {},
        is_restart=is_restart,
        is_sweep_job=is_sweep_job,
        hparams=hparams.select_hyperparameters(hydra_config, spec.plain, reads_experiment=resumed is None),
    )


class JobChannel:
    """Sends jobs, one after the other, from the rank that composes them to the others, through their store."""

    def __init__(self, store: Store, environment: ProcessEnvironment) -> None:
        self._store = store
        self._environment = environment
        self._number = 0

    def send(self, job: Job) -> None:
        """Sends the next job."""
        self._put(job.encode())

    def end(self, status: int) -> None:
        """Sends the exit status of all ranks in place of another job.

        If the store is of this process, waits until the others have received it.
        """
        from runner.utils.distributed import wait_for_keys

        self._put(message.encode(status))
        if not (self._environment.has_external_store or self._environment.store_file):
            with contextlib.suppress(RuntimeError):  # they have ended already
                keys = [f"bye/{rank}" for rank in range(1, self._environment.world_size)]
                wait_for_keys(self._store, keys, _LINGER_S)

    def _put(self, data: bytes) -> None:
        self._store.set(f"job/{self._number}", data)  # type: ignore[arg-type]  # torch's stub lacks bytes
        self._number += 1

    def receive(self) -> Job | int:
        """Waits for the next job; returns an exit status if there is none.

        Raises:
            JobError: something else was received.
        """
        from runner.utils.distributed import wait_for_keys

        key = f"job/{self._number}"
        self._number += 1
        # Composing takes a while. If rank 0 is gone, so is the store or the launcher, and the wait ends.
        wait_for_keys(self._store, [key], math.inf)
        received = _decode(self._store.get(key))
        if type(received) is not int:
            return _check(received)
        self._store.set(f"bye/{self._environment.rank}", "")
        return received


_LINGER_S = 10.0
