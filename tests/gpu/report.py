"""Writes report.json, report.md and failures.log from the results of the parts of the GPU check so far.

    python tests/gpu/report.py PARTS OUT SECONDS

The exit status is 0 if tests ran and none of them failed or was interrupted.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from figures import describe_value

TIMEOUT_STATUSES = (124, 137)  # of a part that exceeded its time


def read_json(path):
    """Returns the content of a JSON file, or None if it is missing or incomplete after a kill."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_parts(folder):
    """Returns the exit status and seconds of each part, from the lines that `run.sh` wrote, and its last output."""
    parts = {}
    path = folder / "parts.txt"
    for line in path.read_text().splitlines() if path.exists() else ():
        name, status, seconds = line.split()
        path = folder / f"tail-{name}.txt"
        tail = path.read_text(errors="replace") if path.exists() else ""
        parts[name] = {"status": int(status), "seconds": int(seconds), "tail": tail}
    return parts


def read_outcomes(path, status):
    """Returns the last outcome of each test of a part.

    Args:
        status: of the part; None while it runs.
    """
    last = {}
    for line in path.read_text().splitlines():
        try:
            facts = json.loads(line)
        except ValueError:  # an incomplete last line: the process was killed
            continue
        if last.get(facts["test"], {}).get("outcome") != "failed":
            last[facts["test"]] = facts
    for facts in last.values():
        if facts["outcome"] == "started":
            is_timeout = status in TIMEOUT_STATUSES
            cause = "it hung, or the time of its part was spent" if is_timeout else "its process ended with it"
            facts |= {"outcome": "failed", "text": f"{cause} (status {status}): see the output of its part"}
        elif facts["outcome"] == "not run":
            facts["reason"] = f"not run: its part ended before it (status {status})"
    return list(last.values())


def make_report(folder, seconds):
    """Returns the report as plain data."""
    parts = read_parts(folder)
    tests = []
    for path in sorted(folder.glob("outcomes-*.jsonl")):
        part = parts.get(f"correctness-{path.stem.removeprefix('outcomes-')}", {})
        tests += read_outcomes(path, part.get("status"))
    benchmarks = [read_json(path) for path in sorted(folder.glob("figures-*.json"))]
    benchmarks = [benchmark for benchmark in benchmarks if benchmark is not None]
    skipped = [{"name": facts["test"], "reason": facts["reason"]} for facts in tests if "reason" in facts]
    return {
        "machine": read_json(folder / "machine.json") or {"gpu": "unknown: see the output of the part machine"},
        "seconds": seconds,
        "parts": parts,
        "tests": dict(Counter(facts["outcome"] for facts in tests)),
        "failures": [facts for facts in tests if facts["outcome"] == "failed"],
        "skipped": skipped + [part for benchmark in benchmarks for part in benchmark["skipped"]],
        "figures": [figure for benchmark in benchmarks for figure in benchmark["figures"]],
    }


def find_trouble(report):
    """Returns a line for each problem, and whether one of them is a failure of correctness."""
    trouble = [f"{facts['test']} failed" for facts in report["failures"]]
    for name, part in report["parts"].items():
        is_known = name.startswith("correctness") and part["status"] == 1 and report["failures"]
        if part["status"] and not is_known:
            trouble.append(f"part {name} ended with status {part['status']} after {part['seconds']} s")
    if "passed" not in report["tests"]:
        trouble.append("no test passed")
    is_failure = any(not line.startswith("part ") or line.startswith("part correctness") for line in trouble)
    return trouble, is_failure


def to_markdown(report, trouble, is_failure):
    """Returns the report as Markdown."""
    has_gpu = report["machine"]["gpu"] != "none"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report["tests"].items()) or "no test ran"
    goals = Counter(figure["is_met"] for figure in report["figures"] if "goal" in figure)
    lines = [
        f"# GPU check: {report['machine']['gpu'] if has_gpu else 'no GPU, a rehearsal on the simulated device'}",
        "",
        f"Correctness: {counts}; {'FAILED' if is_failure else 'no failure'}.",
        f"Goals of the benchmarks: {goals[True]} met, {goals[False]} missed.",
        "",
        *(f"- {name}: {value}" for name, value in report["machine"].items()),
        f"- seconds in all: {report['seconds']}",
        *(f"- part {name}: status {part['status']}, {part['seconds']} s" for name, part in report["parts"].items()),
    ]
    if trouble:
        lines += ["", "## Trouble (failures.log has the details)", "", *(f"- {line}" for line in trouble)]
    for table in dict.fromkeys(figure["table"] for figure in report["figures"]):
        lines += ["", *_table_of(table, [figure for figure in report["figures"] if figure["table"] == table])]
    lines += ["", "## Skipped", ""]
    for reason, count in Counter(skipped["reason"] for skipped in report["skipped"]).items():
        names = [skipped["name"] for skipped in report["skipped"] if skipped["reason"] == reason]
        lines += [f"- {count} x {reason}", *(f"    - {name}" for name in names)]
    if not report["skipped"]:
        lines.append("Nothing.")
    return "\n".join(lines) + "\n"


def _table_of(table, figures):
    columns = list(dict.fromkeys(figure["column"] for figure in figures))
    cells = {(figure["row"], figure["column"]): describe_value(figure) for figure in figures}
    lines = [f"## {table}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in dict.fromkeys(figure["row"] for figure in figures):
        lines.append(f"| {row} | {' | '.join(cells.get((row, column), '') for column in columns)} |")
    return lines


def list_failures(report):
    """Returns the text of each failed test, and the last output of each part that failed."""
    texts = {facts["test"]: facts.get("text", "") for facts in report["failures"]}
    texts |= {f"part {name}": part["tail"] for name, part in report["parts"].items() if part["status"]}
    return "".join(f"{'=' * 100}\n{name}\n{text}\n" for name, text in texts.items()) or "Nothing failed.\n"


def main():
    parts, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    report = make_report(parts, seconds)
    trouble, is_failure = find_trouble(report)
    (folder / "failures.log").write_text(list_failures(report))
    for part in report["parts"].values():
        del part["tail"]
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(to_markdown(report, trouble, is_failure))
    print((folder / "report.md").read_text())
    sys.exit(is_failure)


if __name__ == "__main__":
    main()
