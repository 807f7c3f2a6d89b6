"""A pytest plugin that writes each outcome at once, so that a run that hangs or is killed keeps earlier outcomes.

GPU_CHECK_OUTCOMES=FILE python -m pytest -p tests.gpu.record ...
"""

import json
import os

_FILE = open(os.environ["GPU_CHECK_OUTCOMES"], "a", buffering=1)  # noqa: SIM115  # written line by line


def _write(**facts):
    _FILE.write(json.dumps(facts) + "\n")


def pytest_collection_finish(session):
    """Writes the collected tests, so that those missing after a crash are known."""
    for item in session.items:
        _write(test=item.nodeid, outcome="not run")


def pytest_runtest_logstart(nodeid):
    _write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report):
    """Writes the outcome of a test; for setup and teardown only a failure."""
    if report.when != "call" and report.passed:
        return
    facts = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.skipped:
        facts["reason"] = report.longrepr[2].removeprefix("Skipped: ")  # after its file and line
    elif report.failed:
        facts["text"] = f"{report.longreprtext}\n{report.capstdout}{report.capstderr}"[-20_000:]
    _write(**facts)


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, outcome="failed", text=str(report.longrepr))
