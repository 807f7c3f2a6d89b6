"""Waits until a run has logged a step or a file has a text."""

import json
import time


def wait_for_content(path, content, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and content in path.read_bytes():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {content!r}")


def wait_for_step(project, step, run="outputs/**"):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in project.folder.glob(f"{run}/metrics.jsonl"):
            lines = path.read_text().splitlines()
            if lines and any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
                return
        time.sleep(0.05)
    raise AssertionError("the run did not get there")
