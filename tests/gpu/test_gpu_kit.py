"""The GPU check itself: its report of parts that pass, fail, hang and are skipped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import time
import pytest

def test_passes(): pass

def test_fails():
    assert 1 == 2, "the reason"

@pytest.mark.skip(reason="needs a CUDA GPU")
def test_is_skipped(): pass

def test_hangs():
    open("hanging", "w").close()
    time.sleep(60)

def test_comes_after_it(): pass
"""


def run(*command, **settings):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)


@pytest.fixture
def parts(tmp_path):
    """A folder with the results of the parts of a check."""
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "machine.json").write_text('{"gpu": "NVIDIA H100"}')
    (folder / "parts.txt").write_text("correctness-blocks 0 12\nmemory 124 160\n")
    outcome = {"test": "tests/x.py::test_one", "outcome": "passed", "seconds": 0.1}
    (folder / "outcomes-blocks.jsonl").write_text(json.dumps(outcome) + "\n")
    return folder


def report(parts, status):
    """Writes the report; returns it as data and as text."""
    done = run(sys.executable, ROOT / "tests/gpu/report.py", parts, parts.parent, 300)
    assert done.returncode == status, done.stderr
    assert done.stdout.strip() == (parts.parent / "report.md").read_text().strip()
    return json.loads((parts.parent / "report.json").read_text()), done.stdout


def test_the_report_shows_figures_beside_their_goals_and_what_was_skipped(parts):
    figure = {"table": "memory: wide", "row": "ours", "unit": "x"}
    figures = [
        figure | {"column": "step", "value": 1.013, "goal": "at most 1.02", "is_met": True},
        figure | {"column": "share", "value": 0.5, "goal": "at least 0.85", "is_met": False},
        figure | {"row": "none", "column": "step", "value": "out of memory"},
    ]
    skipped = [{"name": "memory: long", "reason": "the budget of 150 s was spent"}]
    (parts / "figures-memory.json").write_text(json.dumps({"figures": figures, "skipped": skipped}))
    data, text = report(parts, status=0)  # a benchmark that was cut short decides nothing
    assert data["machine"] == {"gpu": "NVIDIA H100"}
    assert data["tests"] == {"passed": 1}
    assert text.startswith("# GPU check: NVIDIA H100\n")
    assert "Correctness: 1 passed; no failure.\nGoals of the benchmarks: 1 met, 1 missed." in text
    assert "- part memory ended with status 124 after 160 s" in text
    assert "| ours | 1.013 x (goal: at most 1.02, met) | 0.5 x (goal: at least 0.85, MISSED) |" in text
    assert "| none | out of memory x |  |" in text
    assert "- 1 x the budget of 150 s was spent\n    - memory: long" in text


def test_a_run_that_hangs_keeps_the_outcomes_before_it_and_fails(parts, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    environment = os.environ | {"GPU_CHECK_OUTCOMES": str(parts / "outcomes-runs.jsonl"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.record", "-p", "no:cacheprovider", "test_some.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "hanging").exists():
            assert process.poll() is None
        process.kill()
    with open(parts / "outcomes-runs.jsonl", "a") as file:
        file.write('{"test": "test_some.py::test_co')  # killed in the midst of a line
    with open(parts / "parts.txt", "a") as file:
        file.write("correctness-runs 137 5\n")
    data, text = report(parts, status=1)
    assert data["tests"] == {"passed": 2, "failed": 2, "skipped": 1, "not run": 1}
    assert "test_some.py::test_hangs failed" in text
    assert "correctness-runs ended with status 137 after 5 s" in text
    assert data["skipped"] == [
        {"name": "test_some.py::test_is_skipped", "reason": "needs a CUDA GPU"},
        {"name": "test_some.py::test_comes_after_it", "reason": "not run: its part ended before it (status 137)"},
    ]
    failures = (tmp_path / "failures.log").read_text()
    assert "the reason" in failures
    assert "it hung, or the time of its part was spent" in failures


def test_no_test_at_all_is_a_failure(parts):
    (parts / "outcomes-blocks.jsonl").unlink()
    _, text = report(parts, status=1)
    assert "- no test passed" in text


@pytest.mark.parametrize("status", [1, 2, 4, 124, 139])
def test_a_correctness_part_that_ends_early_is_a_failure(parts, status):
    (parts / "parts.txt").write_text(f"correctness-blocks {status} 65\n")
    report(parts, status=1)


@pytest.fixture
def copy(tmp_path):
    """A copy of the check without a folder of wheels, and with an earlier report."""
    folder = tmp_path / "a copy/tests/gpu"
    folder.mkdir(parents=True)
    (folder / "run.sh").write_text((ROOT / "tests/gpu/run.sh").read_text())
    (tmp_path / "out").mkdir()
    for name in ("report.md", "log.txt"):
        (tmp_path / "out" / name).write_text("an earlier one")
    return folder / "run.sh"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": sys.executable}, "see tests/gpu/README.md"),
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python: no such program"),
        ({"TMPDIR": "/no/such/folder"}, "TMPDIR=/no/such/folder: no temporary folder"),
    ],
)
def test_a_check_that_cannot_start_says_why_and_keeps_the_earlier_report(copy, environment, message):
    out = copy.parents[3] / "out"
    done = run("bash", copy, out, env=os.environ | {"PYTHON": sys.executable} | environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert (out / "report.md").read_text() == (out / "log.txt").read_text() == "an earlier one"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_check_and_all_processes_that_it_started(copy, number, tmp_path):
    """The parts are replaced by ones that sleep; one of them starts a process in a session of its own."""
    script = copy.read_text()
    beginning, _, _ = script.partition("figures=$work/parts/figures\n")
    install = re.search(r'"\$python" -m pip .*?README.md"\n', beginning, re.DOTALL)
    sleeps = "setsid sleep 1234 & touch started; sleep 1234"
    copy.write_text(beginning.replace(install[0], "") + f"part speed 60 bash -c '{sleeps}'\npart saves 60 sleep 1234\n")
    (copy.parent / "report.py").write_text("")
    root = copy.parents[2]
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(["bash", copy, tmp_path / "out"], env=environment, stdout=subprocess.DEVNULL)
    while not (root / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(20) == 130
    left = run("grep", "-lsazF", f"TMPDIR={tmp_path}/tmp.", *Path("/proc").glob("[0-9]*/environ")).stdout
    assert not left
    assert not [*tmp_path.glob("tmp.*")]


def run_tiny(case, *given):
    """Runs a GPU case of the memory benchmark on the CPU, much smaller; returns the output."""
    done = run(sys.executable, ROOT / "tests/benchmarks/memory.py", "--tiny", "--only", case, *given, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "outcome" not in done.stdout  # a row that failed
    assert "skipped" not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_gpu_rows_of_the_memory_benchmark_run_on_the_cpu(tmp_path):
    run_tiny("2048 x 8192", "--json", tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    timed = {figure["row"] for figure in found["figures"] if figure["column"] == "step"}
    assert timed == {"none", "checkpoint", "checkpoint + save_on_cpu", "ours, no offload", "ours"}


@pytest.mark.slow
def test_the_search_for_the_longest_sequence_runs_on_the_cpu():
    run_tiny("longest")


@pytest.mark.slow
def test_a_budget_that_is_spent_skips_by_name(tmp_path):
    for script in ("memory.py", "default_run.py", "copies.py", "saves.py"):
        path = tmp_path / f"{script}.json"
        given = ["--budget", "0", "--json", path]
        done = run(sys.executable, ROOT / "tests/benchmarks" / script, *given, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found = json.loads(path.read_text())
        assert found["skipped"]
        assert not found["figures"]


def test_the_downloaded_wheels_are_those_that_are_installed_in_the_tested_versions():
    command = next(line for line in (ROOT / "tests/gpu/README.md").read_text().splitlines() if "pip download" in line)
    downloaded = dict(re.findall(r"([\w-]+)==(\S+)", command))
    script = (ROOT / "tests/gpu/run.sh").read_text()
    (installed,) = re.findall(r"^    (hydra-core [\w ./-]+) \|\|$", script, re.MULTILINE)
    assert set(installed.split()) == set(downloaded)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert downloaded == {name: pinned[name] for name in downloaded}
