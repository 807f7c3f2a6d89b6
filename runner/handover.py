"""A run as the process that composed it hands it to those that run it, and the way there: a file, or torch's store.

Must not import torch at the top: what is wrong in a config is told before that.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner import config, run_folder, warm_start
from runner.schema import DistributedConfig
from runner.utils.files import make_folder, replace_file

if TYPE_CHECKING:
    from torch.distributed import Store

    from runner.utils.place import Place


@dataclass
class Handover:
    """A composed run, its config resolved.

    `files` are those of `.hydra/`, as Hydra would write them. With `goes_on`, its folder may hold the run already: it
    then goes on from the newest checkpoint there.
    """

    settings: dict[str, Any]
    folder: Path
    files: dict[str, bytes]
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    goes_on: bool = False
    is_unclaimed: bool = False  # its folder is to be made by the first rank
    is_asked_for: bool = False  # that folder and no other
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def distributed(self) -> DistributedConfig:
        """The settings by which its processes are started."""
        return config.typed(DistributedConfig, self.settings["distributed"])

    def write_config(self) -> None:
        """Puts the config in the run's folder, once all is built, each file whole at every moment.

        Beside it stands the structure of the weights files that the models were built from.
        """
        make_folder(self.folder / ".hydra", self.folder)
        for name, text in self.files.items():
            replace_file(self.folder / ".hydra" / f"{name}.yaml", [text])
        path = self.folder / ".hydra" / warm_start.RECORD
        if self.settings["resume"] is None and (content := warm_start.record(self.settings, path)) is not None:
            replace_file(path, [content])


def make(cfg: DictConfig, folder: Path, *, goes_on: bool = False, resumed: Path | None = None) -> Handover:
    """Returns the hand-over of the job that Hydra runs now; nothing in it needs Hydra any more.

    Args:
        resumed: the folder of the run that goes on, which keeps its hydra.yaml: `${hydra:...}` tells what that says.
    """
    hydra_config: Any = HydraConfig.instance().cfg
    contents = {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.hydra.overrides.task}
    files = {name: OmegaConf.to_yaml(content).encode() for name, content in contents.items()}
    if resumed is not None and (resumed / ".hydra" / "hydra.yaml").is_file():
        del files["hydra"]
    with run_folder.told_of(resumed, cfg) if resumed else contextlib.nullcontext():
        return Handover(config.to_plain(cfg), folder.absolute(), files, goes_on=goes_on)


class Post:
    """Hand-overs in the store of a run's processes, from the one that composes to the others, job after job.

    What one's own processes say is believed: hand-overs are pickles.
    """

    def __init__(self, store: Store, place: Place) -> None:
        self._store, self._place = store, place
        self._number = 0

    def send(self, handover: Handover) -> None:
        """Hands the next job over."""
        self._put(pickle.dumps(handover))

    def end(self, status: int) -> None:
        """Says that there is no other job, and with which status all end; where the store is here, waits for them."""
        self._put(pickle.dumps(status))
        if not self._place.has_host:
            with contextlib.suppress(RuntimeError):  # they are gone already, or never came
                others = [f"bye/{rank}" for rank in range(1, self._place.num_ranks)]
                self._store.wait(others, timedelta(seconds=_LINGER_S))

    def _put(self, data: bytes) -> None:
        self._store.set(f"job/{self._number}", data)  # type: ignore[arg-type]  # torch's stub lacks bytes
        self._number += 1

    def receive(self) -> Handover | int:
        """Waits for the next job; returns a status where there is none."""
        from torch.distributed import DistStoreError

        key = f"job/{self._number}"
        self._number += 1
        while True:
            try:
                self._store.wait([key], timedelta(minutes=1))
            except DistStoreError:
                continue  # whoever composes takes its time; if it is gone, so is the store or the launcher
            found: Handover | int = pickle.loads(self._store.get(key))
            if not isinstance(found, Handover):
                self._store.set(f"bye/{self._place.rank}", "")
            return found


_LINGER_S = 10.0
