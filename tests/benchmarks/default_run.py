"""The default experiment against a hand-written loop: time per step, tokens per second, time to the first step.

    python tests/benchmarks/default_run.py [--json FILE] [--budget SECONDS] [--steps N] [--rounds N]

On the accelerator where there is one, else on the CPU. The command is `python -m runner`, without evaluations, saves
and exports. The bare loop has the same model, data, optimizer, schedule and clipping, and reads its loss every
`log_every` steps. Each is a process of its own, and they take turns over the rounds; then both take short turns in one
process, where the difference between them is measured more precisely.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from figures import Budget, BudgetSpentError, Figures
from peers.workload import make_factor

# torch is not imported at the top: the bare script's time to its first step includes that import.

STEPS = {"cuda": 600, "cpu": 40}
ROUNDS = {"cuda": 1, "cpu": 1}
MIN_STEPS = 40
STEPS_OF_A_TURN = {"cuda": 20, "cpu": 10}
MAX_US_ABOVE = 100  # the goal on an accelerator, where a step takes milliseconds; on the CPU it takes 100 or more
MAX_TURNS_S = 25  # of which some go to the imports
STOPPING_S = 4  # for a turn that has begun
QUIET = ["trainer.save_every=0", "trainer.eval_every=0", "trainer.eval_at_start=false", "trainer.export_every=0"]
RUNNER, BARE = "runner", "bare loop"
STEP_TABLE = "speed: the default experiment"
TURNS_TABLE = "speed: the default experiment, in turns in one process"
START_TABLE = "speed: time to the first step"


class BareLoop:
    """The default experiment written by hand, as a plain PyTorch loop with the config's values."""

    def __init__(self, settings):
        import torch
        from torch.utils.data import DataLoader

        from runner.examples.byte_gpt import ByteGPT
        from runner.examples.source_code import SourceCode
        from runner.utils.sampler import RandomSampler

        trainer, data = settings["trainer"], settings["data"]
        if trainer["precision"] != "fp32" or trainer["accumulate"] != 1:
            raise ValueError("the bare loop trains in fp32 and without accumulation; the config says otherwise")
        self.device = torch.device(settings["device"])
        self.clip_norm, self.log_every = trainer["clip_norm"], trainer["log_every"]
        torch.manual_seed(settings["seed"])
        self.model = ByteGPT(**arguments_of(settings["model"])).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, **arguments_of(settings["optimizer"]))
        factor = make_factor(**arguments_of(settings["scheduler"]))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        dataset = SourceCode(**arguments_of(data["train"]))
        # The runner's order, so that both train on the same batches.
        sampler = RandomSampler(len(dataset), **arguments_of(settings["sampler"]))
        self.loader = DataLoader(
            dataset,
            data["batch_size"],
            sampler=sampler,
            num_workers=data["num_workers"],
            pin_memory=self.device.type == "cuda",
            drop_last=True,
        )
        self.batches = self.endless()
        self.step = 0
        self.first = None

    def endless(self):
        while True:
            yield from self.loader

    def run(self, num_steps):
        """Trains; returns the steps at which the loss was read, each with the time after it in seconds."""
        from torch.nn.utils import clip_grad_norm_

        moments = []
        for _ in range(num_steps):
            window = next(self.batches)["window"].to(self.device, non_blocking=True)
            loss = self.model(window)["loss"]
            loss.backward()
            clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
            if self.step % self.log_every == 0:
                loss.item()  # waits for the device
                moments.append((self.step, time.perf_counter()))
            if self.first is None:
                value = loss.item()
                self.first = {"time": time.time(), "loss": value}
        return moments


def arguments_of(node):
    """Returns the arguments that a node of the config gives to its `_target_`."""
    return {name: value for name, value in node.items() if name != "_target_"}


def train_bare(settings):
    """Trains with the hand-written loop in a process of its own, and prints the measurements as JSON."""
    loop = BareLoop(settings)
    moments = loop.run(settings["trainer"]["steps"])
    print(json.dumps({"moments": moments, "first": loop.first}))


def train_in_turns(settings):
    """Alternates short turns of the bare loop and the runner's loop in one process; prints seconds per step as JSON.

    The thread that writes the runner's metrics may run in a turn of either; the rounds of processes count it fully.
    """
    bare = BareLoop(settings)  # before `make_runner_loop`, which keeps torch's compiler from being loaded
    turn_steps = STEPS_OF_A_TURN[settings["device"]]
    with tempfile.TemporaryDirectory() as folder:
        loop, tracker = make_runner_loop(settings, folder)

        def run_command():
            loop.steps += turn_steps
            loop.run()

        turns = {RUNNER: run_command, BARE: lambda: bare.run(turn_steps)}
        seconds = {name: [] for name in turns}
        for number in range(settings["trainer"]["steps"] // turn_steps + 1):
            if time.time() >= settings["ends_at"]:
                break
            # The order alternates, because caches and clock rates may differ for the second one.
            for name in sorted(turns, reverse=number % 2 == 1):
                began = time.perf_counter()
                turns[name]()  # ends with a logged step, which waits for the device
                if number:
                    seconds[name].append((time.perf_counter() - began) / turn_steps)
        tracker.close()
    print(json.dumps(seconds))


def make_runner_loop(settings, folder):
    """Returns the runner's loop over the default experiment, as in a run, and its tracker."""
    from runner.control.commands import CommandQueue
    from runner.control.handlers import COMMANDS
    from runner.run.build.experiment import build
    from runner.tracking.tracker import TrackerThread
    from runner.utils.train import Loop
    from runner.utils.train.failures import FailurePolicy

    experiment = build(compose_config(settings["trainer"]["steps"]))
    trainer, tracker = experiment.trainer, TrackerThread(folder)
    loop = Loop(
        experiment.engines,
        experiment.batches,
        steps=0,
        seed=experiment.seed,
        log_every=trainer.log_every,
        log=tracker.log,
        queue=CommandQueue(COMMANDS, print),
        policy=FailurePolicy(trainer.on_oom.name, trainer.max_skips),
        coordinator=experiment.coordinator,
    )
    return loop, tracker


def compose_config(steps):
    from hydra import compose, initialize_config_dir

    from runner.config import checks

    checks.register_with_hydra()
    with initialize_config_dir(config_dir=str(checks.CONF_DIR.resolve()), version_base="1.3"):
        return compose("config", overrides=[*QUIET, f"trainer.steps={steps}"])


class Processes:
    """Starts the contenders, each in a folder of its own, within the budget."""

    def __init__(self, settings, budget):
        import runner

        self.settings, self.budget = settings, budget
        path = [str(Path(runner.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def call(self, arguments, folder):
        """Runs Python to its end; returns its output and its start time."""
        self.budget.check()
        began = time.time()
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=self.budget.left(),
            )
        except subprocess.TimeoutExpired:
            raise BudgetSpentError(f"the budget of {self.budget.seconds:g} s ended while it ran") from None
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        return done.stdout, began

    def by_hand(self, work, settings=None):
        """Runs a function of this file in a process of its own; returns its output and its start time."""
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(settings or self.settings)
            printed, began = self.call([str(Path(__file__).resolve()), work, text], folder)
        return json.loads(printed.splitlines()[-1]), began

    def train_bare(self):
        """Returns the bare loop's moments and its first step."""
        found, began = self.by_hand("train_bare")
        first = {"seconds": found["first"]["time"] - began, "loss": found["first"]["loss"]}
        return {"moments": found["moments"], "first": first}

    def train_command(self, steps):
        """Returns the moments of `python -m runner`, and its first logged step."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            settings = [*QUIET, f"trainer.steps={steps}", f"hydra.run.dir={folder}"]
            _, began = self.call(["-m", "runner", *settings], name)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            logged = read_first_time(folder)
        moments = [(line["step"], line["time_s"]) for line in lines]
        return {"moments": moments, "first": {"seconds": logged - began, "loss": lines[0]["train/loss"]}}


def read_first_time(folder):
    """Returns the wall-clock time at which a run logged its first step, which TensorBoard's file has."""
    from tensorboard.compat.proto.event_pb2 import Event

    from runner.tracking.event_file import find_event_files, read_records

    with open(find_event_files(folder)[0], "rb") as file:
        events = [Event.FromString(record) for record in read_records(file)]
    return next(event.wall_time for event in events if event.step)


def windows_of(moments, steps):
    """Returns the seconds per step of each window between two logged steps, and of all, after a quarter of the run."""
    kept = [(step, moment) for step, moment in moments if step >= steps // 4]
    pairs = itertools.pairwise(kept)
    windows = [(later[1] - former[1]) / (later[0] - former[0]) for former, later in pairs]
    mean = (kept[-1][1] - kept[0][1]) / (kept[-1][0] - kept[0][0])
    return {"median": statistics.median(windows), "mean": mean}


def measure_rounds(processes, steps, rounds, figures, found):
    """Runs the contenders in turns; adds the result of each complete part of a round to `found`."""
    longest_s = 0.0
    for number in range(1, rounds + 1):
        try:
            processes.budget.check(longest_s)
            began = time.monotonic()
            bare = processes.train_bare()
            found["first"][BARE].append(bare["first"])
            command = processes.train_command(steps)
            pair = {BARE: windows_of(bare["moments"], steps), RUNNER: windows_of(command["moments"], steps)}
            found["steps"].append(pair)
            found["first"][RUNNER].append(processes.train_command(1)["first"])
            longest_s = max(longest_s, time.monotonic() - began)
        except BudgetSpentError as reason:
            figures.skip(f"{STEP_TABLE}: round {number} of {rounds}", str(reason))
            return


def add_steps(figures, table, pairs, settings, is_goal):
    """Adds the figures of seconds per step, given by contender for each round or turn."""
    num_tokens = settings["data"]["batch_size"] * settings["data"]["train"]["context"]
    for name in (BARE, RUNNER):
        step_s = statistics.median(pair[name] for pair in pairs)
        figures.add(table, name, "time per step", step_s * 1e6, "us")
        figures.add(table, name, "tokens per second", num_tokens / step_s)
    above_us = statistics.median((pair[RUNNER] - pair[BARE]) * 1e6 for pair in pairs)
    goal = {"at_most": MAX_US_ABOVE} if is_goal else {}
    figures.add(table, RUNNER, "above the bare loop", above_us, "us", **goal)
    if len(pairs) >= 4:
        low, _, high = statistics.quantiles([(pair[RUNNER] - pair[BARE]) * 1e6 for pair in pairs], n=4)
        figures.add(table, RUNNER, "the middle half of the differences", f"{low:.0f} to {high:.0f} us")
    ratio = statistics.median(pair[RUNNER] / pair[BARE] for pair in pairs)
    figures.add(table, RUNNER, "ratio to the bare loop", ratio, "x")


def add_rounds(figures, rounds, settings):
    """Adds the figures of the rounds: by the median window of each process, and by its mean."""
    is_goal = settings["device"] != "cpu"
    medians = [{name: found["median"] for name, found in pair.items()} for pair in rounds]
    add_steps(figures, STEP_TABLE, medians, settings, is_goal)
    # The median ignores occasional work, such as that of the thread that writes metrics; the mean includes it.
    above_us = statistics.median((pair[RUNNER]["mean"] - pair[BARE]["mean"]) * 1e6 for pair in rounds)
    figures.add(STEP_TABLE, RUNNER, "above the bare loop, by means", above_us, "us")
    figures.add(STEP_TABLE, RUNNER, "rounds", len(rounds))


def add_starts(figures, found):
    """Adds the figures of the first step: seconds from the start of the process, and its loss."""
    seconds = {
        name: statistics.median(first["seconds"] for first in firsts) for name, firsts in found.items() if firsts
    }
    for name, value in seconds.items():
        figures.add(START_TABLE, name, "from start to first step", value, "s")
        figures.add(START_TABLE, name, "loss of the first step", found[name][0]["loss"], "nats")
    if len(seconds) == 2:
        figures.add(START_TABLE, RUNNER, "above the bare script", seconds[RUNNER] - seconds[BARE], "s")
        difference = abs(found[RUNNER][0]["loss"] - found[BARE][0]["loss"])
        figures.add(START_TABLE, RUNNER, "difference of the losses", difference, "nats", at_most=1e-4)


def measure_turns(processes, figures):
    """Measures both loops in one process, turn by turn."""
    ends_at = time.time() + min(processes.budget.left() - STOPPING_S, MAX_TURNS_S)
    seconds, _ = processes.by_hand("train_in_turns", processes.settings | {"ends_at": ends_at})
    pairs = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    if not pairs:
        raise BudgetSpentError(f"its part of the budget of {processes.budget.seconds:g} s ended before two turns")
    figures.add(TURNS_TABLE, RUNNER, "turns", len(pairs))
    add_steps(figures, TURNS_TABLE, pairs, processes.settings, processes.settings["device"] != "cpu")


def measure_all(asked, figures):
    """Measures what the budget allows; returns whether every part worked."""
    budget = Budget(asked.budget)
    found = {"steps": [], "first": {BARE: [], RUNNER: []}}
    made = {}

    def prepare():
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        made["steps"], made["rounds"] = asked.steps or STEPS[device], asked.rounds or ROUNDS[device]
        from runner.config.checks import to_plain

        settings = to_plain(compose_config(made["steps"])) | {"device": device}
        made["processes"] = Processes(settings, budget)
        print(f"{made['steps']} steps on {device}, {made['rounds']} rounds, torch {torch.__version__}", flush=True)

    def prepared():
        budget.check()
        if "processes" not in made:
            raise RuntimeError("the config could not be composed")
        return made["processes"]

    parts = {
        "speed: preparation": prepare,
        "speed: rounds": lambda: measure_rounds(prepared(), made["steps"], made["rounds"], figures, found),
        STEP_TABLE: lambda: add_rounds(figures, require_some(found["steps"]), made["processes"].settings),
        START_TABLE: lambda: add_starts(figures, {n: require_some(firsts) for n, firsts in found["first"].items()}),
        TURNS_TABLE: lambda: measure_turns(prepared(), figures),
    }
    worked = [measure_part(name, part, figures) for name, part in parts.items()]
    return all(worked)


def require_some(found):
    """Returns `found`, unless it is empty."""
    if not found:
        raise BudgetSpentError("nothing was measured; the messages above say why")
    return found


def measure_part(name, part, figures):
    """Runs one part and reports its error, so that the other parts can run. Returns whether it worked."""
    try:
        part()
    except BudgetSpentError as reason:
        figures.skip(name, str(reason))
    except Exception as error:
        traceback.print_exc()
        figures.skip(name, f"{type(error).__name__}: {error}")
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; what is left then is skipped")
    parser.add_argument("--steps", type=int, help=f"of a process; by default {STEPS}")
    parser.add_argument("--rounds", type=int, help=f"by default {ROUNDS}")
    asked = parser.parse_args()
    if asked.steps is not None and asked.steps < MIN_STEPS:
        parser.error(f"--steps {asked.steps}: expected {MIN_STEPS} or more, for windows after the warm-up")
    sys.exit(0 if measure_all(asked, Figures(asked.json)) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train_bare"]:
        train_bare(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["train_in_turns"]:
        train_in_turns(json.loads(sys.argv[2]))
    else:
        main()
