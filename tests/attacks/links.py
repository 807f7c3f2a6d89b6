"""Links in a run's folder that lead to the user's files: standing there, or put there while a command runs."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from attacks.plants import CHECKPOINT, OWN, UNTRUSTED, attack, clear, events_of, link, newest, seal

BOTH = (OWN, UNTRUSTED)
LINE = b"\ntouch decoy/canary #\n"


def _of_file(name, *commands, of=BOTH):
    """Adds a link in the place of a file, once to one of the user's files and once to one that would be made."""

    def lead_to_file(run, decoy):
        link(run / name, decoy / "diary.txt")

    def lead_to_nothing(run, decoy):
        link(run / name, decoy / "created.txt")

    short = name.replace("/", "_").strip(".")
    attack(*commands, of=of, name=f"link_{short}")(lead_to_file)
    attack(commands[0], of=of[:1], name=f"dangling_link_{short}")(lead_to_nothing)


_of_file("exports/model.safetensors", "export", "resume", "sweep")
_of_file("audio/original-00000006.wav", "resume", "requeue")
_of_file("audio/original-00000004.wav", "sweep")
_of_file("log.txt", "resume", "sweep", "evaluate", "restart")
_of_file("metrics.jsonl", "resume", "sweep", "restart")
_of_file("run.json", "resume", "sweep")
_of_file(".lock", "resume", "sweep", "restart")
_of_file(".hydra/overrides.yaml", "resume")
_of_file(".hydra/hydra.yaml", "resume")


@attack("export")
def export_of_chosen_bytes(run, decoy):
    """The attacker chooses the bytes that would be written where the link leads."""
    weights = newest(run) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-len(LINE) :] = LINE
    weights.write_bytes(content)
    seal(newest(run))
    link(run / "exports" / "model.safetensors", decoy / "bashrc")


@attack("export", "resume", of=BOTH)
def link_of_exports_folder(run, decoy):
    link(run / "exports", decoy / "notes")


@attack("export", of=BOTH)
def dangling_link_of_exports_folder(run, decoy):
    link(run / "exports", decoy / "made")


@attack("resume", "requeue", of=BOTH)
def link_of_audio_folder(run, decoy):
    link(run / "audio", decoy / "notes")


@attack("resume", "sweep")
def link_of_event_file(run, decoy):
    shutil.copy(events_of(run), decoy / "events")
    link(events_of(run), decoy / "events")


@attack("resume")
def absolute_link_of_event_file(run, decoy):
    events_of(run).unlink()
    (run / "events.out.tfevents.1.x.1.0").symlink_to(decoy / "diary.txt")


@attack("resume", "sweep", "restart")
def link_of_whole_record(run, decoy):
    link(run / "run.json", decoy / "copy" / "run.json")


@attack("resume", "sweep")
def link_of_whole_metrics(run, decoy):
    link(run / "metrics.jsonl", decoy / "copy" / "metrics.jsonl")


@attack("resume", "evaluate", "sweep", of=BOTH)
def link_of_config(run, decoy):
    link(run / ".hydra" / "config.yaml", decoy / "copy" / ".hydra" / "config.yaml")


@attack("resume", "sweep", "restart", of=BOTH)
def link_of_hydra_folder(run, decoy):
    link(run / ".hydra", decoy / "copy" / ".hydra")


@attack("resume", "export", "requeue")
def link_of_checkpoints_folder(run, decoy):
    """To a copy of the run's own, which the run itself may be linked to: so it goes on from another disk."""
    link(run / "checkpoints", decoy / "copy" / "checkpoints")


@attack("resume")
def link_of_checkpoints_folder_to_another_run(run, decoy):
    """That run is the user's own, too, so what marks its folders is valid."""
    link(run / "checkpoints", decoy.parent / "other" / "checkpoints")


@attack("restart", "resume", of=BOTH)
def link_of_checkpoints_folder_to_notes(run, decoy):
    link(run / "checkpoints", decoy / "notes")


@attack("resume", "resume_checkpoint", "export_checkpoint", of=BOTH)
def link_of_checkpoint(run, decoy):
    link(run / CHECKPOINT, decoy / "copy" / CHECKPOINT)


@attack("resume")
def link_of_checkpoint_to_save(run, decoy):
    link(run / "checkpoints" / "step_00000006", decoy / "notes")


@attack("resume", "sweep")
def links_of_half_written_checkpoints(run, decoy):
    """One for each process that could write there next."""
    newest_pid = int(Path("/proc/loadavg").read_text().split()[-1])
    for pid in range(newest_pid, newest_pid + 300):
        for step in (4, 6):
            link(run / "checkpoints" / f".step_{step:08d}.{pid}.partial", decoy / "notes")


@attack("resume")
def links_of_left_checkpoints(run, decoy):
    for kind in ("partial", "replaced", "pruned"):
        link(run / "checkpoints" / f".step_00000006.1.{kind}", decoy / "notes")
        link(run / "checkpoints" / f".step_00000002.1.{kind}", decoy / "copy" / CHECKPOINT)


@attack("resume", "evaluate")
def links_in_a_checkpoint(run, decoy):
    for name in ("model.safetensors", "trainer.json", "MANIFEST.json"):
        link(run / CHECKPOINT / name, decoy / "copy" / CHECKPOINT / name)


@attack("resume")
def link_of_shards_in_a_checkpoint(run, decoy):
    link(run / CHECKPOINT / "shards", decoy / "notes")
    seal(run / CHECKPOINT)


@attack("export", "resume")
def chain_of_links(run, decoy):
    (run / "one").mkdir()
    (run / "one" / "two").symlink_to("../three")
    (run / "three").symlink_to("./four/../../decoy")
    (run / "four").mkdir()
    clear(run / "exports")
    (run / "exports").symlink_to("one/two/notes")
    clear(run / "audio")
    (run / "audio").symlink_to("one/two")


@attack("export", "resume", "sweep")
def links_that_lead_to_themselves(run, decoy):
    for name in ("exports", "audio", "log.txt"):
        clear(run / name)
        (run / name).symlink_to(name)


@attack("resume", "export")
def links_by_the_file_system_of_processes(run, decoy):
    """`/proc/self/cwd` is where the command was typed."""
    for name, target in (("exports", "decoy/notes"), ("audio", "decoy/notes"), ("log.txt", "decoy/diary.txt")):
        clear(run / name)
        (run / name).symlink_to(f"/proc/self/cwd/{target}")


@attack("sweep")
def link_of_multirun_file(run, decoy):
    link(run.parent / "multirun.yaml", decoy / "diary.txt")


@attack("sweep")
def dangling_link_of_multirun_file(run, decoy):
    link(run.parent / "multirun.yaml", decoy / "created.yaml")


@attack("sweep")
def link_of_sweep_job(run, decoy):
    """The job's own run is there, so that the job would resume it."""
    shutil.move(run, decoy / "job")
    link(run, decoy / "job")


@attack("sweep")
def link_of_empty_sweep_job(run, decoy):
    link(run, decoy / "notes")


@attack("resume", "restart")
def hard_links(run, decoy):
    for name in ("log.txt", ".lock", "metrics.jsonl"):
        clear(run / name)
        os.link(decoy / "diary.txt", run / name)


def _target_of(path, decoy):
    return decoy / ("diary.txt" if path.suffix in (".txt", ".json", ".jsonl") else "notes")


def _swaps(*names):
    """Returns a function that replaces files and folders by links and puts them back, again and again."""

    def plant(run, decoy):
        places = [run / name for name in names]
        spares = decoy.parent / "tmp" / "spares"
        clear(spares)
        spares.mkdir()

        def swap(is_over):
            while not is_over.is_set():
                time.sleep(0.002)
                for path in places:
                    with contextlib.suppress(OSError):
                        os.rename(path, spares / path.name)
                        path.symlink_to(_target_of(path, decoy))
                time.sleep(0.0005)
                for path in places:
                    with contextlib.suppress(OSError):
                        if path.is_symlink():
                            path.unlink()
                        os.rename(spares / path.name, path)

        return swap

    return plant


def _late(*names):
    """Returns a function that replaces files and folders by links once a run has begun and replaces its config."""

    def plant(run, decoy):
        config = run / ".hydra" / "config.yaml"
        before = config.stat().st_ino

        def put_links(is_over):
            while not is_over.is_set():
                with contextlib.suppress(OSError):
                    if config.stat().st_ino != before:
                        break
                time.sleep(0.0002)
            for name in names:
                with contextlib.suppress(OSError):
                    link(run / name, _target_of(run / name, decoy))

        return put_links

    return plant


attack("export", "resume", name="swapped_exports_folder")(_swaps("exports"))
attack("resume", "sweep", name="swapped_files")(_swaps("log.txt", "metrics.jsonl", "run.json"))
attack("resume", name="swapped_folders")(_swaps(".hydra", "audio", "checkpoints"))
attack("resume", "sweep", name="links_of_folders_put_late")(_late("exports", "audio"))
attack("resume", "sweep", name="links_of_files_put_late")(
    _late("exports/model.safetensors", "audio/original-00000006.wav", "run.json", "checkpoints/step_00000006")
)
attack("resume", "requeue", name="link_of_checkpoints_put_late")(_late("checkpoints"))
attack("resume", name="link_of_hydra_put_late")(_late(".hydra"))
