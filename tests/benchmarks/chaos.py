"""Kills a run 200 times and more, at random instants and inside its saves: `python tests/benchmarks/chaos.py [SEEDS]`.

Prints the kills, the checkpoints lost, and the resumed runs that differ from the one that nobody killed.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import HEAVY, OVERRIDES, Chaos, Zygote, find_difference
from conftest import Project

NUM_KILLS = 200


def main():
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_KILLS
    zygote = Zygote()
    num_runs = num_unequal = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        with open(project.folder / "own.py", "a") as file:
            file.write(HEAVY)
        chaos = Chaos(project.folder, zygote, OVERRIDES)
        while chaos.num_kills < wanted:
            run = f"run_{num_runs}"
            chaos.run_with_kills(run, random.Random(1000 + num_runs))
            difference = find_difference(chaos.content(run), chaos.expected)
            num_unequal += difference is not None
            num_runs += 1
            if difference:
                print(f"{run}: {difference}")
        print(
            f"{chaos.num_kills} kills of {num_runs} runs: {chaos.num_lost} lost checkpoints, {num_unequal} unequal runs"
        )
    zygote.close()
    sys.exit(chaos.num_lost + num_unequal > 0)


if __name__ == "__main__":
    main()
