"""The Python API: a config composed, edited and trained, and the run read back, as the command line would have it."""

import copy
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import yaml
from run_comparison import assert_same_run

import runner

SMALL = ["experiment=mine", "trainer.steps=6", "trainer.save_every=3", "trainer.eval_every=3"]


def compose(*overrides):
    return runner.compose([*SMALL, *overrides], config_dir="conf")


def test_importing_the_package_imports_neither_torch_nor_hydra_and_composing_no_torch(tmp_path):
    code = (
        "import sys, runner; assert not {'torch', 'hydra', 'omegaconf', 'numpy'} & sys.modules.keys(); "
        "assert {'compose', 'train', 'open'} < {*dir(runner)}; runner.compose(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_run_equals_that_of_the_command_line(home):
    run = runner.train(compose("hydra.run.dir=api"))
    home.run(*SMALL[1:], "hydra.run.dir=command")
    assert (run.status, run.step, run.folder) == ("finished", 6, home.folder / "api")
    assert_same_run(run.folder, home.folder / "command", 6)
    for name in ("config.yaml", "overrides.yaml"):
        assert (run.folder / ".hydra" / name).read_bytes() == (home.folder / "command/.hydra" / name).read_bytes()
    texts = [(home.folder / name / ".hydra" / "hydra.yaml").read_text() for name in ("api", "command")]
    api, command = (yaml.safe_load(text)["hydra"] for text in texts)
    assert api["run"] == {"dir": "api"}
    assert api["runtime"]["choices"] == command["runtime"]["choices"]
    sources = [[source["path"] for source in each["runtime"]["config_sources"]] for each in (api, command)]
    assert sources[0] == sources[1]


def test_two_runs_of_one_config_are_equal_and_have_a_folder_each(home):
    config = compose()
    one, other = runner.train(config), runner.train(config)
    assert one.folder != other.folder
    assert one.folder.parent.parent == home.folder / "outputs"
    assert_same_run(one.folder, other.folder, 6)


def wait_for_end_of_children():
    deadline = time.monotonic() + 30
    while children := multiprocessing.active_children():
        assert time.monotonic() < deadline, children
        time.sleep(0.01)


WORKERS = ["data.num_workers=2", "trainer.eval_every=1", "trainer.eval_at_start=true", "hydra.run.dir=kept"]


COUNTED = """
import own

_MISSING = object()
NUM_CALLS = 0


class Data(own.Data):
    def __init__(self, scale=_MISSING, **settings):
        super().__init__(**settings)
        self.scale = scale

    def __getitem__(self, index):
        global NUM_CALLS
        NUM_CALLS += 1
        sample = super().__getitem__(index)
        sample["y"] = sample["y"] + NUM_CALLS * (1 if self.scale is _MISSING else self.scale)
        return sample
"""


def test_evaluations_of_a_dataset_that_changes_are_those_of_an_interrupted_run(home):
    (home.folder / "counted.py").write_text(COUNTED)
    config = (*SMALL[1:], *WORKERS[:-1], "data.eval._target_=counted.Data")
    home.run(*config, "hydra.run.dir=whole")
    home.run(*config, "hydra.run.dir=halves", "trainer.steps=3")
    home.run("resume=halves", "trainer.steps=6")
    assert_same_run(home.folder / "whole", home.folder / "halves", 6)


def test_evaluations_that_keep_their_workers_equal_others_and_leave_no_process(home):
    run = runner.train(compose(*WORKERS, "data.persistent_workers=true"))
    wait_for_end_of_children()
    other = runner.train(compose(*WORKERS[:-1], "hydra.run.dir=new"))
    assert_same_run(run.folder, other.folder, 6)


def test_a_run_that_fails_leaves_no_worker_of_its_evaluations(home):
    with pytest.raises(runner.RunError):
        runner.train(compose(*WORKERS, "data.persistent_workers=true", "optimizer.lr=1e30"))
    wait_for_end_of_children()


def test_a_value_that_is_set_on_the_config_is_trained_with_and_recorded_like_an_override(home):
    config = compose("hydra.run.dir=edited")
    config.optimizer.lr = 0.5
    config["trainer"]["steps"] = 2
    runner.train(config)
    assert_same_run(
        home.folder / "edited",
        runner.train(compose("hydra.run.dir=typed", "optimizer.lr=0.5", "trainer.steps=2")).folder,
        2,
    )
    overrides = yaml.safe_load((home.folder / "edited/.hydra/overrides.yaml").read_text())
    assert sorted(overrides[len(SMALL) :]) == ["optimizer.lr=0.5", "trainer.steps=2"]
    records = [json.loads((home.folder / name / "run.json").read_text())["hparams"] for name in ("edited", "typed")]
    assert records[0].items() >= {"optimizer.lr": 0.5, "trainer.steps": 2}.items()
    assert records[0].items() >= {key: records[1][key] for key in ("optimizer.lr", "trainer.steps")}.items()


def test_a_node_that_is_set_on_the_config_replaces_the_choice_of_a_group(home):
    config = compose("hydra.run.dir=edited")
    config.report = None
    config.optimizer = {"_target_": "torch.optim.SGD", "lr": 0.25}
    run = runner.train(config)
    assert run.config.report is None
    assert run.config.optimizer == {"_target_": "torch.optim.SGD", "lr": 0.25}
    assert yaml.safe_load((run.folder / ".hydra/overrides.yaml").read_text()) == SMALL


def test_a_config_is_printed_as_yaml_and_is_copied_as_a_whole(home):
    config = compose()
    copied = copy.deepcopy(config)
    copied.trainer.steps = 2
    assert yaml.safe_load(str(config))["trainer"]["steps"] == config.trainer.steps == 6
    assert "hydra" not in yaml.safe_load(str(config))
    assert list(config) == list(yaml.safe_load(str(config)))
    assert not hasattr(config, "shape")


@pytest.mark.parametrize(
    "overrides",
    [["trainer.stps=3"], ["model=nope"], ["seed=-1"], ["optimizer.lr"], ["resume=outputs/none"], ["seed=1,2"]],
    ids=str,
)
def test_a_mistake_raises_the_message_that_the_command_line_prints(home, overrides):
    with pytest.raises(runner.ConfigError) as raised:
        runner.compose([*SMALL, *overrides], config_dir="conf")
    assert str(raised.value) in home.run(*SMALL[1:], *overrides, status=2)


def test_a_mistake_in_a_value_that_is_set_names_the_key(home):
    config = compose()
    with pytest.raises(runner.ConfigError, match=r"^trainer\.steps=many: expected a whole number, found a text$"):
        config.trainer.steps = "many"
    with pytest.raises(runner.ConfigError, match=r"^trainer\.stps: no such key; did you mean steps\?"):
        config.trainer.stps = 3
    config.trainer.accumulate = 3
    with pytest.raises(runner.ConfigError, match=r"data\.batch_size=8: expected a multiple of trainer\.accumulate=3"):
        runner.train(config)
    with pytest.raises(runner.ConfigError, match="found a part of it"):
        runner.train(config.trainer)
    assert not home.runs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("seed=3", r"write compose\(\['seed=3'\]\)"),
        (["-m", "seed=1,2"], "train in a loop"),
        (["--config-dir", "conf"], "config_dir="),
    ],
)
def test_arguments_of_the_command_line_are_refused_with_a_remedy(overrides, message):
    with pytest.raises(runner.ConfigError, match=message):
        runner.compose(overrides)


def test_a_wrong_target_is_refused_before_a_folder_is_made(home):
    with pytest.raises(runner.ConfigError, match=r"model\._target_=own\.Mdel"):
        runner.train(compose("model._target_=own.Mdel"))
    assert not home.runs
    assert not (home.folder / "outputs").exists() or not any((home.folder / "outputs").glob("*/*"))


def test_a_run_is_resumed_and_equals_one_that_was_not_cut(home):
    run = runner.train(compose("trainer.steps=3"))
    config = runner.compose([f"resume={run.folder}", "trainer.steps=6"])
    resumed = runner.train(config)
    assert (resumed.folder, resumed.status, resumed.step) == (run.folder, "finished", 6)
    assert_same_run(run.folder, runner.train(compose()).folder, 6)


def test_a_resumed_run_refuses_a_value_that_makes_it_another_run(home):
    run = runner.train(compose())
    config = runner.compose([f"resume={run.folder}"])
    config.seed = 5
    with pytest.raises(runner.ConfigError, match="seed: 0 -> 5"):
        runner.train(config)


def interrupt_at(run_folder, step, number=signal.SIGINT):
    """Sends this process a signal, from a thread, once a run has logged a step."""

    def watch():
        metrics = run_folder / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


SLOW = ["+data.train.sleep_s=0.005", "trainer.steps=40", "trainer.save_every=0", "trainer.eval_every=0"]


def test_an_interrupted_run_is_saved_and_resumes_to_the_same_end(home):
    watching = interrupt_at(home.folder / "cut", 5)
    run = runner.train(compose(*SLOW, "hydra.run.dir=cut"))
    watching.join()
    assert run.status == "interrupted"
    assert 5 <= run.step < 40
    assert [checkpoint.step for checkpoint in run.checkpoints] == [run.step]
    whole = runner.train(compose(*SLOW, "hydra.run.dir=whole"))
    assert runner.train(runner.compose(["resume=cut"])).status == "finished"
    assert_same_run(run.folder, whole.folder, 40)


def test_objects_that_exist_before_a_run_are_collected_after_it(home):
    class Node:
        pass

    node = Node()
    node.itself = node
    reference = weakref.ref(node)
    runner.train(compose("trainer.steps=1"))
    del node
    gc.collect()
    assert reference() is None


def test_a_second_interrupt_raises_at_once_and_the_program_goes_on(home):
    (home.folder / "stall").touch()

    def interrupt_twice():
        while not (home.folder / "stalling").exists():
            time.sleep(0.01)
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.train(compose("data.train._target_=own.Stalls", "hydra.run.dir=stalled"))
    thread.join()
    assert runner.open("stalled").status == "interrupted"
    (home.folder / "stall").unlink()
    time.sleep(1)  # longer than the command line waits before it ends a process that does not react
    assert runner.train(compose()).status == "finished"


def test_another_signal_takes_its_effect_once_the_run_is_saved(home):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(runner.open("cut").status))
    try:
        watching = interrupt_at(home.folder / "cut", 5, signal.SIGUSR1)
        run = runner.train(compose(*SLOW, "hydra.run.dir=cut"))
        watching.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == ["preempted"]
    assert run.checkpoints


def test_a_model_that_fails_raises_its_own_error_and_leaves_its_state(home):
    feeder = "feeder={_target_: own.fail_at_call, _partial_: true}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_FAILURE", "nan@5")
        with pytest.raises(runner.RunError, match="its loss is nan") as raised:
            runner.train(compose("hydra.run.dir=failed", feeder))
    run = runner.open("failed")
    assert run.status == "failed"
    assert str(raised.value) in (run.folder / "run.json").read_text()
    assert [checkpoint.step for checkpoint in run.checkpoints] == [3, 4]
    with pytest.raises(RuntimeError, match="the model's own mistake"):
        runner.train(compose("feeder={_target_: own.fail, _partial_: true}"))


def test_a_thread_trains_too_and_a_second_run_meanwhile_is_refused(home):
    done = []
    earlier = runner.train(compose())
    config = compose(*SLOW, "trainer.steps=20", "hydra.run.dir=threaded")
    thread = threading.Thread(target=lambda: done.append(runner.train(config).status))
    thread.start()
    while not (home.folder / "threaded" / "metrics.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(runner.ConfigError, match="another that trains in this process"):
        runner.train(compose())
    with pytest.raises(runner.ConfigError, match="engines: expected no run that trains in another thread"):
        earlier.engines()  # building modules would change the run's random numbers
    assert compose("seed=3").seed == 3
    thread.join()
    assert done == ["finished"]
    assert list(earlier.engines()) == ["model"]


def test_metrics_are_columns_with_nan_where_a_row_has_no_number(home, monkeypatch):
    run = runner.train(compose())
    frame = run.metrics()
    monkeypatch.setitem(sys.modules, "pandas", None)
    columns = run.metrics()
    assert list(columns)[:2] == ["step", "time_s"]
    assert columns["step"].dtype == np.int64
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for name, column in columns.items():
        expected = [np.nan if line.get(name) is None else line[name] for line in lines]
        np.testing.assert_array_equal(column, expected)
        np.testing.assert_array_equal(frame[name], expected)
    assert np.isfinite(columns["train/loss"]).sum() == 6


def test_metrics_leave_out_damaged_lines(home):
    run = runner.train(compose())
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    num_left = len(lines) - 2
    lines[1] = lines[1].replace('"step"', '"stp"')
    path.write_text("".join(lines)[:-9])
    assert len(run.metrics()["step"]) == num_left
    path.unlink()
    assert len(run.metrics()["step"]) == 0


def test_engines_have_the_weights_of_a_checkpoint_in_evaluation_mode(home):
    import torch

    from runner.utils import io

    run = runner.train(compose("trainer.keep_best=1"))
    start, first, last = run.checkpoints
    assert start.metric > first.metric > last.metric
    assert run.engines("best")["model"].module.training is False
    for checkpoint, asked in ((first, 3), (last, None), (last, "last")):
        weights = io.load(checkpoint.path / "model.safetensors")
        for name, tensor in run.engines(asked)["model"].module.state_dict().items():
            assert torch.equal(tensor, weights[name])
    with pytest.raises(runner.ConfigError, match=r"checkpoint=4: expected last, best or one of the steps 0, 3, 6"):
        run.engines(4)
    (last.path / "trainer.json").write_text("{}")
    assert run.checkpoints == [start, first]


def test_engines_that_were_not_saved_are_an_error_that_names_what_is_missing(home):
    run = runner.train(compose("trainer.eval_every=0"))
    with pytest.raises(runner.ConfigError, match=r"checkpoint=best: .* has none, see trainer.keep_best; its steps are"):
        run.engines("best")
    run = runner.train(compose("trainer.save_every=0"))
    for checkpoint in (None, "best", 3):
        with pytest.raises(runner.ConfigError, match=r"the run has saved no checkpoint; see trainer.save_every"):
            run.engines(checkpoint)


@pytest.mark.parametrize("overrides", [None, [3], "seed=1", ["seed=1", None]])
def test_overrides_that_are_no_list_of_texts_are_an_error_that_shows_them(overrides):
    with pytest.raises(runner.ConfigError, match=r"^overrides=.*: expected a list of texts"):
        runner.compose(overrides)


def test_an_untrusted_folder_is_refused_unless_its_modules_are_allowed(home):
    run = runner.train(compose())
    (run.folder / ".hydra" / "signature.json").unlink()
    with pytest.raises(runner.ConfigError, match=r"(?s)own\.Model: its module is not on.*allow-targets own") as raised:
        run.engines()
    command = [sys.executable, "-m", "runner.export", run.folder]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=home.folder)
    assert printed.stderr.strip() == str(raised.value)
    assert run.engines(allow_targets=["own"])["model"].module.training is False


def test_the_config_of_a_run_is_read_only(home):
    from omegaconf.errors import ReadonlyConfigError

    config = runner.train(compose()).config
    assert config.trainer.steps == 6
    with pytest.raises(ReadonlyConfigError):
        config.trainer.steps = 7


def test_a_run_is_opened_by_a_checkpoint_too_and_a_missing_one_is_refused(home):
    run = runner.train(compose())
    assert runner.open(run.checkpoints[0].path).folder == run.folder
    assert repr(run) == f"Run({str(run.folder)!r}, status='finished', step=6)"
    with pytest.raises(runner.ConfigError, match="no such folder"):
        runner.open("none")


@pytest.mark.slow
def test_processes_train_as_from_the_command_line(home):
    two = ["distributed=ddp", "distributed.nproc_per_node=2", "distributed.device=cpu"]
    run = runner.train(compose(*two, "hydra.run.dir=api"))
    home.run(*SMALL[1:], *two, "hydra.run.dir=command", forks_workers=True)
    assert run.status == "finished"
    assert_same_run(run.folder, home.folder / "command", 6)
    with pytest.raises(runner.RunError, match=r"the model's own mistake.*log\.txt"):
        runner.train(compose(*two, "feeder={_target_: own.fail, _partial_: true}"))
    with pytest.raises(runner.ConfigError, match=r"^model: KeyError"):
        runner.train(compose(*two, "model._target_=own.Raises"))
