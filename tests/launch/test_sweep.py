"""How the jobs of a sweep end: a line where one fails, a table of all at the end, the exit status."""

import json
import pickle

import pytest

from runner.launch import sweep


@pytest.fixture(autouse=True)
def _no_other_sweep():
    sweep.begin(["experiment=mine", "model.width=1,2", "seed=range(2)"])
    yield
    sweep.begin([])


def test_a_job_that_fails_is_told_once_with_the_values_that_vary(capsys):
    sweep.record(0, ("experiment=mine", "model.width=1"), "finished", 0, "eval/loss 1 at step 2", 1.0)
    sweep.record(1, ("experiment=mine", "model.width=2", "seed=1"), "failed", 1, "why")
    assert capsys.readouterr() == ("", "job 1 (model.width=2 seed=1) failed: why\n")


def test_the_table_has_the_values_that_vary_and_the_status_says_how_jobs_failed(capsys):
    sweep.record(1, ("experiment=mine", "model.width=2"), "refused", 2, "a mistake")
    sweep.record(0, ("experiment=mine", "model.width=1"), "finished", 0, "eval/loss 1 at step 2", 1.0)
    assert sweep.end() == 2
    sweep.record(2, ("experiment=mine", "model.width=30"), "failed", 1, "x" * 1000)
    assert sweep.end() == 1
    first, second = capsys.readouterr().out.split("job  ")[1:]
    assert first.splitlines() == [
        "model.width  status    result",
        "0    1            finished  eval/loss 1 at step 2",
        "1    2            refused   a mistake",
    ]
    assert max(map(len, second.splitlines())) < 250


def test_an_outcome_of_another_process_is_taken_down_where_it_arrives(capsys):
    outcome = sweep.Outcome(3, ("model.width=2",), "failed", 1, "why", None)
    arrived = pickle.loads(pickle.dumps(outcome))
    assert arrived == outcome
    assert capsys.readouterr().err == ""  # the process that ran it has told it
    assert sweep.end() == 1


def test_control_characters_of_values_and_reasons_are_escaped(capsys):
    sweep.record(0, ("model.width='\x1b[31m\n'",), "failed", 1, "a\x1b[31m")
    sweep.end()
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed
    assert printed.count("\n") == 3


@pytest.mark.parametrize("record", [None, "", "[]", '"x"', '{"status": 3, "best": [], "reason": {}}'])
@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_record_of_any_kind_is_described(tmp_path, record, status):
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    name, _, result, metric = sweep.describe_end(tmp_path, status)
    assert name == ("failed" if status else "finished")
    assert (result, metric) == ("step None", None) or (status and result.startswith(f"exit status {status}; see "))


def test_the_best_metric_is_told(tmp_path):
    best = {"name": "eval/loss", "value": 0.125, "step": 7}
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "best": best, "last_step": 9}))
    assert sweep.describe_end(tmp_path, 0) == ("finished", 0, "eval/loss 0.125 at step 7", 0.125)


SEARCH = '''
import json
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class Search(BasicSweeper):
    """Launches one batch of jobs, as a sweeper that searches does, and writes their values to a file."""

    def sweep(self, arguments):
        rates = next(a for a in arguments if a.startswith("optimizer.lr=")).partition("=")[2].split(",")
        others = [a for a in arguments if not a.startswith("optimizer.lr=")]
        jobs = [[*others, f"optimizer.lr={rate}"] for rate in rates]
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        with open("values.json", "w") as file:
            json.dump([job.return_value for job in returns], file)
'''


def test_a_sweeper_that_searches_is_given_the_best_metric_of_each_job(project):
    (project.folder / "hydra_plugins").mkdir()
    (project.folder / "hydra_plugins" / "search.py").write_text(SEARCH)
    target = ["hydra.sweeper._target_=hydra_plugins.search.Search", "hydra.sweep.dir=sweep"]
    printed = project.run_afresh("-m", *target, "trainer.steps=4", "trainer.eval_every=2", "optimizer.lr=1e-3,1e-1")
    records = [json.loads(path.read_text()) for path in sorted(project.folder.glob("sweep/*/run.json"))]
    values = json.loads((project.folder / "values.json").read_text())
    assert values == [record["best"]["value"] for record in records], printed
    assert len({*values}) == 2
