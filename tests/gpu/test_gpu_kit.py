"""The GPU check itself: what its report says of parts that pass, fail, hang and are skipped."""

import json
import os
import re
import subprocess
import sys
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
"""


def run(*command, **settings):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)


@pytest.fixture
def parts(tmp_path):
    """A folder as the parts of a check leave it."""
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
    with open(parts / "parts.txt", "a") as file:
        file.write("correctness-runs 137 5\n")
    data, text = report(parts, status=1)
    assert data["tests"] == {"passed": 2, "failed": 2, "skipped": 1}
    assert "test_some.py::test_hangs failed" in text
    assert "correctness-runs ended with status 137 after 5 s" in text
    assert data["skipped"] == [{"name": "test_some.py::test_is_skipped", "reason": "needs a CUDA GPU"}]
    failures = (tmp_path / "failures.log").read_text()
    assert "the reason" in failures
    assert "killed: it hung" in failures


def test_no_test_at_all_is_a_failure(parts):
    (parts / "outcomes-blocks.jsonl").unlink()
    _, text = report(parts, status=1)
    assert "- no test ran" in text


@pytest.mark.parametrize("status", [2, 4, 124])
def test_a_correctness_part_that_ends_early_is_a_failure(parts, status):
    (parts / "parts.txt").write_text(f"correctness-blocks {status} 65\n")
    report(parts, status=1)


@pytest.mark.parametrize("missing", ["wheels", "python"])
def test_without_wheels_or_python_it_says_what_is_missing(missing, tmp_path):
    """The check is started from a copy that has no folder of wheels."""
    copy = tmp_path / "tests/gpu"
    copy.mkdir(parents=True)
    (copy / "run.sh").write_text((ROOT / "tests/gpu/run.sh").read_text())
    python = sys.executable if missing == "wheels" else "no-such-python"
    done = run("bash", copy / "run.sh", tmp_path / "out", env=os.environ | {"PYTHON": python})
    assert done.returncode == 2
    assert "see tests/gpu/README.md" in done.stderr


def run_tiny(case, *given):
    """Runs a GPU case of the memory benchmark on the CPU, far smaller; returns what was printed."""
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
    for script in ("memory.py", "default_run.py", "saves.py"):
        path = tmp_path / f"{script}.json"
        given = ["--budget", "0", "--json", path]
        done = run(sys.executable, ROOT / "tests/benchmarks" / script, *given, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found = json.loads(path.read_text())
        assert found["skipped"]
        assert not found["figures"]


def test_the_wheels_that_are_downloaded_are_those_that_are_installed_in_the_versions_that_are_tested():
    command = next(line for line in (ROOT / "tests/gpu/README.md").read_text().splitlines() if "pip download" in line)
    downloaded = dict(re.findall(r"([\w-]+)==(\S+)", command))
    (installed,) = re.findall(
        r"^    (hydra-core [\w ./-]+) \|\| \{$", (ROOT / "tests/gpu/run.sh").read_text(), re.MULTILINE
    )
    assert set(installed.split()) == set(downloaded)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert downloaded == {name: pinned[name] for name in downloaded}
