"""Kills a run at least 200 times, at random times and during saves: `python tests/benchmarks/chaos.py [KILLS]`.

With `--ranks 2`, a run of so many ranks: one of them or the launcher, by DDP and, every third run, by FSDP. Prints the
kills, the checkpoints lost, and the resumed runs that differ from the one that nobody killed.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import HEAVY, OVERRIDES, Chaos, Zygote, find_difference
from conftest import Project
from rank_chaos import RankChaos


def kill_process(project, zygote, wanted, first):
    chaos = Chaos(project.folder, zygote, OVERRIDES)
    num_runs = num_unequal = 0
    while chaos.num_kills < wanted:
        run = f"run_{num_runs}"
        chaos.run_with_kills(run, random.Random(first + num_runs))
        difference = find_difference(chaos.content(run), chaos.expected)
        num_unequal += difference is not None
        num_runs += 1
        if difference:
            print(f"{run}: {difference}")
    print(f"{chaos.num_kills} kills of {num_runs} runs: {chaos.num_lost} lost checkpoints, {num_unequal} unequal runs")
    return chaos.num_lost + num_unequal


def kill_ranks(project, zygote, wanted, first, num_ranks):
    both = [RankChaos(project.folder, zygote, how, num_ranks) for how in ("ddp", "fsdp")]
    num_runs = num_unequal = 0
    while sum(chaos.num_kills for chaos in both) < wanted:
        run, generator, chaos = f"run_{num_runs}", random.Random(first + num_runs), both[num_runs % 3 == 2]
        if num_runs % 5 < 3:
            chaos.by_ranks(run, generator)
        else:
            chaos.by_launcher(run, generator, is_real=num_runs % 10 == 9)
        try:
            difference = find_difference(chaos.content(run), chaos.expected)
        except (OSError, ValueError) as error:
            difference = str(error)
        num_unequal += difference is not None
        num_runs += 1
        for what in [*([f"{run}: {difference}"] if difference else []), *chaos.troubles]:
            print(what, flush=True)
        if difference or chaos.troubles:
            print(chaos.printed[-5000:], file=sys.stderr)
        chaos.num_troubles += len(chaos.troubles)
        chaos.troubles.clear()
    kills, starts, lost, troubles = (
        sum(getattr(chaos, name) for chaos in both) for name in ("num_kills", "num_starts", "num_lost", "num_troubles")
    )
    print(
        f"{kills} kills in {starts} starts of {num_runs} runs on {num_ranks} ranks: {lost} lost checkpoints, "
        f"{num_unequal} unequal runs, {troubles} troubles; "
        f"what was left ended within {max(chaos.slowest_s for chaos in both):.1f} s"
    )
    return lost + num_unequal + troubles


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1000)
    asked = parser.parse_args()
    zygote = Zygote()
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        with open(project.folder / "own.py", "a") as file:
            file.write(HEAVY)
        given = project, zygote, asked.kills, asked.seed
        is_wrong = kill_process(*given) if asked.ranks == 1 else kill_ranks(*given, asked.ranks)
    zygote.close()
    sys.exit(is_wrong > 0)


if __name__ == "__main__":
    main()
