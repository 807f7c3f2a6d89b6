"""A program that does everything that is forbidden on a hostile folder, for tests of the stage."""

import os
import sys
import time
from pathlib import Path

from attacks.plants import ESCAPES, FORGED


def main() -> None:
    """Does the harm that the last argument names, in the folder where it is called."""
    globals()[f"_{sys.argv[-1]}"]()


def _change_a_file():
    Path("decoy/diary.txt").write_text("dear Diary\n")  # as long as before


def _make_a_file():
    Path("home/.cache").touch()


def _change_a_mode():
    Path("decoy/tool").chmod(0o777)


def _touch_a_folder():
    Path("decoy/notes/x").touch()
    Path("decoy/notes/x").unlink()


def _leave_the_canary():
    os.system("touch decoy/canary")


def _print_escapes():
    print(ESCAPES)


def _print_a_forged_line():
    print(f"name: a\n{FORGED}")


def _print_the_secret():
    print(os.environ["ATTACK_SECRET"])


def _keep_the_secret():
    Path("run/log.txt").write_text(os.environ["ATTACK_SECRET"])


def _log_escapes():
    with open("run/log.txt", "a") as file:
        file.write(ESCAPES)


def _print_much():
    print("x" * 1_000_000)


def _raise():
    raise KeyError("a")


def _hang():
    time.sleep(60)


def _open_a_pipe():
    os.mkfifo("run/pipe")
    Path("run/pipe").read_bytes()


def _grow():
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def _start_processes():
    for _ in range(20):
        if not os.fork():
            time.sleep(60)
            os._exit(0)
    time.sleep(60)


def _end_by_a_signal():
    os.kill(os.getpid(), 11)


def _end_with_a_status():
    sys.exit(139)
