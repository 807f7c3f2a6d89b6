"""Writes report.json, report.md and failures.log from what the parts of the GPU check wrote so far.

    python tests/gpu/report.py PARTS OUT SECONDS

The exit status is 0 if tests ran and none of them failed or was cut short.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from figures import describe_value


def read_outcomes(path):
    """Returns the last outcome of each test; one that began and never ended was killed, perhaps in a hang."""
    last = {}
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        before = last.get(facts["test"], {})
        if before.get("outcome") != "failed":
            last[facts["test"]] = facts
    for facts in last.values():
        if facts["outcome"] == "started":
            facts |= {"outcome": "failed", "text": "killed: it hung, or the time of its part was spent"}
    return list(last.values())


def read_parts(folder):
    """Returns the exit status and seconds of each part, from the lines that `run.sh` wrote."""
    lines = (line.split() for line in (folder / "parts.txt").read_text().splitlines())
    return {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in lines}


def make_report(folder, seconds):
    """Returns the whole report as plain data."""
    machine = folder / "machine.json"
    tests = [facts for path in sorted(folder.glob("outcomes-*.jsonl")) for facts in read_outcomes(path)]
    benchmarks = [json.loads(path.read_text()) for path in sorted(folder.glob("figures-*.json"))]
    return {
        "machine": json.loads(machine.read_text()) if machine.exists() else {"gpu": "unknown"},
        "seconds": seconds,
        "parts": read_parts(folder),
        "tests": dict(Counter(facts["outcome"] for facts in tests)),
        "failures": [facts for facts in tests if facts["outcome"] == "failed"],
        "skipped": [{"name": facts["test"], "reason": facts["reason"]} for facts in tests if "reason" in facts]
        + [skipped for benchmark in benchmarks for skipped in benchmark["skipped"]],
        "figures": [figure for benchmark in benchmarks for figure in benchmark["figures"]],
    }


def find_trouble(report):
    """Returns why the check did not succeed, a line each."""
    trouble = [f"{facts['test']} failed" for facts in report["failures"]]
    for name, part in report["parts"].items():
        if name.startswith("correctness") and part["status"] not in (0, 1):
            trouble.append(f"{name} ended with status {part['status']} after {part['seconds']} s")
    return trouble if report["tests"] else [*trouble, "no test ran"]


def to_markdown(report, trouble):
    """Returns the report for a person."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report["tests"].items()) or "no test ran"
    lines = ["# GPU check", "", f"Correctness: {counts}; {'not ' if trouble else ''}all is well.", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines.append(f"- seconds in all: {report['seconds']}")
    lines += [f"- part {name}: status {part['status']}, {part['seconds']} s" for name, part in report["parts"].items()]
    if trouble:
        lines += ["", "## Failures (failures.log has the details)", "", *(f"- {line}" for line in trouble)]
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


def main():
    parts, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    report = make_report(parts, seconds)
    trouble = find_trouble(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(to_markdown(report, trouble))
    failures = [f"{'=' * 100}\n{facts['test']}\n{facts.get('text', '')}\n" for facts in report["failures"]]
    (folder / "failures.log").write_text("".join(failures) or "No test failed.\n")
    print((folder / "report.md").read_text())
    sys.exit(1 if trouble else 0)


if __name__ == "__main__":
    main()
