"""A run as the process that composed it hands it to those that run it, and the way there: a file, or torch's store.

It travels as a message: what lies in a store that others can reach executes nothing when it is read.

Must not import torch at the top: what is wrong in a config is told before that.
"""

from __future__ import annotations

import contextlib
import math
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner.config import checks, hparams, run_folder
from runner.config.errors import ConfigError
from runner.config.schema import DistributedConfig
from runner.config.trust import import_path, signature
from runner.config.trust.signature import Origin, SignatureError
from runner.run import warm_start
from runner.utils.files import make_folder, message, replace_file

if TYPE_CHECKING:
    from torch.distributed import Store

    from runner.launch.environment import ProcessEnvironment


class JobError(ConfigError):
    """Something else lies where a hand-over is expected. Each process that finds it tells it."""


@dataclass
class Job:
    """A composed run, its config resolved.

    `files` are those of `.hydra/`, as Hydra would write them. With `goes_on`, its folder may hold the run already: it
    then goes on from the newest checkpoint there. An untrusted run that goes on has no `origin`, and stays unsigned. A
    job of a sweep is told in one line where it fails. `hparams` are its hyperparameters, as TensorBoard shows them.
    """

    settings: dict[str, Any]
    folder: Path
    files: dict[str, bytes]
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    python_path: list[str] = field(default_factory=list)  # directories of the user's modules
    origin: dict[str, Any] = field(default_factory=dict)  # where this user has started it
    goes_on: bool = False
    is_job: bool = False
    is_unclaimed: bool = False  # its folder is to be made by the first rank
    is_asked_for: bool = False  # that folder and no other
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    hparams: dict[str, Any] = field(default_factory=dict)

    @property
    def distributed(self) -> DistributedConfig:
        """The settings by which its processes are started."""
        return checks.typed(DistributedConfig, self.settings["distributed"])

    @property
    def links(self) -> dict[str, str]:
        """The folders that links in its folder may lead to, by the links' names."""
        return dict(self.origin.get("links", {}))

    @property
    def has_file_store(self) -> bool:
        """Whether its processes, all on this machine, meet in the launcher's folder instead of at a port."""
        return self.distributed.rdzv_endpoint is None

    def encode(self) -> bytes:
        """Returns it as a message.

        Raises:
            ConfigError: naming the key of an object in the config, as a resolver may return it.
        """
        try:
            return message.encode({each.name: getattr(self, each.name) for each in fields(self)})
        except TypeError:
            for key, value in _objects_in(self.settings):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                expected = "expected a text, number, list or mapping, which can be sent to the run's other processes"
                raise ConfigError(f"{key}: {expected}; found a {kind}; make it of these where it is used") from None
            raise

    @classmethod
    def decode(cls, data: bytes) -> Job:
        """Returns the hand-over that `encode` made a message of.

        Raises:
            HandoverError: the message is of another program, or of another version of this one.
        """
        return _check(_read(data))

    def write_config(self) -> None:
        """Puts the config in the run's folder, once all is built, each file whole at every moment.

        Beside it stands the structure of the weights files that the models were built from.
        """
        folder = self.folder / ".hydra"
        make_folder(folder, self.folder)
        files = {f"{name}.yaml": text for name, text in self.files.items()}
        if self.settings["resume"] is None:
            content = warm_start.record(self.settings, folder / warm_start.RECORD)
            files |= {} if content is None else {warm_start.RECORD: content}
        if self.origin:
            try:
                signature.sign(self.folder, signature.Origin(**self.origin), files)
            except (OSError, SignatureError) as error:
                effect = (
                    "resume, evaluate and export will not know it as yours; set XDG_STATE_HOME to a folder of yours"
                )
                print(f"The run can't be signed: {error}; {effect}", file=sys.stderr)
        for name, text in files.items():
            replace_file(folder / name, [text])


def _objects_in(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what no message can hold, with its key."""
    if isinstance(node, (dict, list, tuple)):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for name, child in children:
            yield from _objects_in(child, f"{key}.{name}".lstrip("."))
        return
    try:
        message.encode(node)
    except TypeError:
        yield key, node


def _read(data: bytes) -> Any:
    try:
        return message.decode(data)
    except ValueError as error:
        raise _error(f"no message ({error})") from error


def _check(values: Any) -> Job:
    types = get_type_hints(Job)
    if not isinstance(values, dict):
        raise _error(f"a {type(values).__name__}")
    if values.keys() != types.keys():
        raise _error(f"the keys {', '.join(map(repr, values))}")
    for name, value in values.items():
        if not _is_of(value, types[name]):
            raise _error(f"{name}={value!r}")
    made = Job(**values)
    try:
        made.distributed  # noqa: B018
    except (KeyError, TypeError, AttributeError) as error:
        raise _error(f"settings with another `distributed` ({error!r})") from error
    return made


def _is_of(value: Any, hint: Any) -> bool:
    """Says whether a value is of a type such as `dict[str, bytes]`."""
    if hint is Any:
        return True
    if not isinstance(value, get_origin(hint) or hint):
        return False
    if isinstance(value, dict):
        key_hint, child_hint = get_args(hint)
        return all(_is_of(key, key_hint) and _is_of(child, child_hint) for key, child in value.items())
    return all(_is_of(child, get_args(hint)[0]) for child in value) if isinstance(value, list) else True


def _error(found: str) -> JobError:
    shown = found if len(found) <= _MOST_SHOWN else f"{found[:_MOST_SHOWN]}..."
    return JobError(
        f"hand-over: expected a run as rank 0 composed it, found {shown}; start all ranks with the same version of the "
        "runner, at an address that no other program uses"
    )


_MOST_SHOWN = 200


def make(
    cfg: DictConfig,
    folder: Path,
    origin: Origin | None,
    *,
    goes_on: bool = False,
    resumed: Path | None = None,
    is_job: bool = False,
) -> Job:
    """Returns the hand-over of the job that Hydra runs now; nothing in it needs Hydra any more.

    Args:
        origin: where this user has started the run; None for an untrusted one.
        is_job: it is one of a sweep's.
        resumed: the folder of the run that goes on, which keeps its hydra.yaml: `${hydra:...}` tells what that says.
    """
    hydra_config: Any = HydraConfig.instance().cfg
    contents = {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.hydra.overrides.task}
    files = {name: OmegaConf.to_yaml(content).encode() for name, content in contents.items()}
    if resumed is not None and (resumed / ".hydra" / "hydra.yaml").is_file():
        del files["hydra"]
    with run_folder.told_of(resumed, cfg) if resumed else contextlib.nullcontext():
        settings = checks.to_plain(cfg)
    return Job(
        settings,
        folder.absolute(),
        files,
        python_path=import_path.list_own(),
        origin=asdict(origin) if origin else {},
        goes_on=goes_on,
        is_job=is_job,
        hparams=hparams.select(hydra_config, settings, reads_experiment=resumed is None),
    )


class JobChannel:
    """Hand-overs in the store of a run's processes, from the one that composes to the others, job after job."""

    def __init__(self, store: Store, place: ProcessEnvironment) -> None:
        self._store, self._place = store, place
        self._number = 0

    def send(self, handover: Job) -> None:
        """Hands the next job over."""
        self._put(handover.encode())

    def end(self, status: int) -> None:
        """Says that there is no other job, and with which status all end; where the store is here, waits for them."""
        from runner.utils.distributed import wait_for

        self._put(message.encode(status))
        if not (self._place.has_external_store or self._place.store_file):
            with contextlib.suppress(RuntimeError):  # they are gone already
                wait_for(self._store, [f"bye/{rank}" for rank in range(1, self._place.world_size)], _LINGER_S)

    def _put(self, data: bytes) -> None:
        self._store.set(f"job/{self._number}", data)  # type: ignore[arg-type]  # torch's stub lacks bytes
        self._number += 1

    def receive(self) -> Job | int:
        """Waits for the next job; returns a status where there is none.

        Raises:
            HandoverError: something else lies there.
        """
        from runner.utils.distributed import wait_for

        key = f"job/{self._number}"
        self._number += 1
        # Whoever composes takes its time. If it is gone, so is the store or the launcher.
        wait_for(self._store, [key], math.inf)
        found = _read(self._store.get(key))
        if type(found) is not int:
            return _check(found)
        self._store.set(f"bye/{self._place.rank}", "")
        return found


_LINGER_S = 10.0
