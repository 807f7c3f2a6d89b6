"""Named pipes, sockets, devices, folders and endless files in the place of a run's own files."""

import os
import socket

from attacks.plants import CHECKPOINT, OWN, UNTRUSTED, attack, clear, events_of

EVENTS = "events"


def _place(run, name):
    path = events_of(run) if name == EVENTS else run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    return path


def put_pipe(run, name):
    """A process that opens it waits for another one."""
    os.mkfifo(_place(run, name))


def put_socket(run, name):
    """Opening it fails."""
    path = _place(run, name)
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


def put_folder(run, name):
    """A folder that is not empty, where a file should be."""
    path = _place(run, name)
    path.mkdir()
    (path / "file").write_text("x")


def put_zeros(run, name):
    """Reading it never ends."""
    _place(run, name).symlink_to("/dev/zero")


def put_device(run, name):
    """The device itself, where the attacker could make one."""
    path = _place(run, name)
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def put_giant(run, name):
    """Zeros that do not fit into memory; on disk they are a hole."""
    path = _place(run, name)
    with path.open("wb") as file:
        file.truncate(1 << 36)


def _add(put, name, *commands, of=(UNTRUSTED,)):
    short = "_".join(name.split("/")[-2:]).lstrip(".").replace(".", "_")
    attack(*commands, of=of, name=f"{put.__name__[4:]}_as_{short}")(lambda run, decoy: put(run, name))


_CONFIG, _RECORD, _METRICS = ".hydra/config.yaml", "run.json", "metrics.jsonl"
_MANIFEST, _TRAINER, _WEIGHTS = (
    f"{CHECKPOINT}/{name}" for name in ("MANIFEST.json", "trainer.json", "model.safetensors")
)

_add(put_pipe, _CONFIG, "evaluate", "resume", "sweep")
_add(put_pipe, ".hydra/overrides.yaml", "resume")
_add(put_pipe, ".hydra/hydra.yaml", "resume", of=(OWN,))
_add(put_pipe, ".hydra/signature.json", "resume", "export", of=(OWN,))
_add(put_pipe, _RECORD, "evaluate", "requeue")
_add(put_pipe, _METRICS, "export", "resume")
_add(put_pipe, EVENTS, "resume")
_add(put_pipe, "log.txt", "resume", "restart")
_add(put_pipe, ".lock", "resume")
_add(put_pipe, "exports/model.safetensors", "export", "evaluate_export")
_add(put_pipe, "audio/original-00000006.wav", "resume")
_add(put_pipe, _MANIFEST, "evaluate", "resume")
_add(put_pipe, _TRAINER, "evaluate")
_add(put_pipe, _WEIGHTS, "export")

_add(put_socket, _CONFIG, "evaluate")
_add(put_socket, _METRICS, "resume")
_add(put_socket, "log.txt", "resume", "restart")
_add(put_socket, _MANIFEST, "evaluate")

_add(put_folder, _CONFIG, "evaluate", "resume", "sweep")
_add(put_folder, _RECORD, "resume", "evaluate")
_add(put_folder, _METRICS, "resume", "export")
_add(put_folder, EVENTS, "resume")
_add(put_folder, "log.txt", "resume", "sweep")
_add(put_folder, ".lock", "resume")
_add(put_folder, "exports/model.safetensors", "export", "resume")
_add(put_folder, "audio/original-00000006.wav", "resume")
_add(put_folder, _MANIFEST, "evaluate")
_add(put_folder, _WEIGHTS, "evaluate")
_add(put_folder, ".hydra/signature.json", "evaluate", "resume", of=(OWN,))

_add(put_zeros, _CONFIG, "evaluate")
_add(put_zeros, _RECORD, "export")
_add(put_zeros, _METRICS, "resume")
_add(put_zeros, EVENTS, "resume")
_add(put_device, _CONFIG, "resume")
_add(put_device, _METRICS, "export")
_add(put_device, _MANIFEST, "evaluate")
_add(put_device, _RECORD, "evaluate")
_add(put_device, "log.txt", "resume")

_add(put_giant, _CONFIG, "evaluate")
_add(put_giant, ".hydra/overrides.yaml", "resume")
_add(put_giant, ".hydra/signature.json", "evaluate", of=(OWN,))
_add(put_giant, _RECORD, "evaluate")
_add(put_giant, _METRICS, "resume", "export")
_add(put_giant, EVENTS, "resume")
_add(put_giant, _MANIFEST, "evaluate")
_add(put_giant, "exports/model.safetensors", "evaluate_export")


@attack("export", "resume")
def a_file_where_a_folder_should_be(run, decoy):
    for name in ("exports", "audio"):
        _place(run, name).write_text("x")


@attack("restart", "resume")
def a_file_where_the_checkpoints_should_be(run, decoy):
    _place(run, "checkpoints").write_text("x")


@attack("restart", "resume", "evaluate")
def a_file_where_the_config_folder_should_be(run, decoy):
    _place(run, ".hydra").write_text("x")
