"""Prints digests of the numbers of short runs, to show that a refactoring changed none of them.

    python tests/regression_digests.py [TREE] [--only PATTERN] [--jobs 1]
    diff <(python tests/regression_digests.py old) <(python tests/regression_digests.py new)

TREE is the root of a checkout, by default that of this script. Each run starts `python -m runner` of that tree in a
temporary folder, on the CPU, with one thread a process. A line has three digests:

- metrics: `metrics.jsonl` without `TIME_LIKE_KEYS`, the numbers that `runner.evaluate` prints, and `audio/*.wav`;
- weights: the tensors of the newest checkpoint and of all exports;
- optimizer: the tensors of the optimizer's state in the newest checkpoint.

A tensor counts by dtype, shape and bytes; names of tensors and files do not count. Both trees need the same machine,
interpreter and packages, those of the extra `test`. A run that fails prints FAILED, with the end of its output on
stderr, and makes the exit status 1.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

TIME_LIKE_KEYS = ("time_s", "step_time_s", "samples_per_s", "tokens_per_s", "memory_gb")  # what follows the last slash
TIMEOUT_S = 300
NUM_LINES_OF_FAILURE = 20

Spellings = tuple[str, ...]  # the same overrides as different trees spell them, the newest first

SHORT = "distributed.device=cpu trainer.steps=6 trainer.log_every=1 trainer.save_every=3 trainer.eval_every=3 "
SHORT += "trainer.export_every=6"
WARMUP = "scheduler.warmup_steps=2"
TEXT = f"{SHORT} model.width=32 model.depth=2 model.heads=2 model.dropout=0.1 data.train.context=32 data.batch_size=8 "
TEXT += "data.eval.max_windows=16 report.num_bytes=8"
BYTE_GPT = f"{TEXT} {WARMUP}"
DIGITS = f"{SHORT} {WARMUP} experiment=digits model.width=4 data.batch_size=16"
AUDIO_CODES = f"{SHORT} {WARMUP} experiment=audio_codes model.width=16 model.depth=2 model.heads=2 "
AUDIO_CODES += "data.train.path=../speech data.train.cache=false data.train.shortest_s=0.3 data.train.longest_s=0.8 "
AUDIO_CODES += "data.train.validation_fraction=0.4 data.train.codec.num_codebooks=4 data.train.codec.card=8 "
AUDIO_CODES += "sampler.max_cost=120 report.prompt_s=0.1 report.continued_s=0.2"
EXPERIMENTS = {"byte_gpt": BYTE_GPT, "digits": DIGITS, "audio_codes": AUDIO_CODES}
SEVERAL_EPOCHS = "+data.train.max_windows=20"
DDP = "distributed=ddp distributed.nproc_per_node=2"
FSDP = "distributed=fsdp distributed.nproc_per_node=2"

LORA = "optimizations.lora.rank=2 optimizations.lora.alpha=4 optimizations.lora.dropout=0.1"
EMA_KEYS = ("ema", "ema=ema ema", "ema=default ema", "optimizations.ema")
EMA = tuple(f"{key}.decay=0.9" for key in EMA_KEYS)
EMA_WARMUP = tuple(f"{key}.decay=0.9 {key.split()[-1]}.warmup=true" for key in EMA_KEYS)
OPTIMIZATIONS: dict[str, str | Spellings] = {
    "unsloth": "optimizations.unsloth=true",
    "checkpointing": "optimizations.checkpointing=full",
    "lora": LORA,
    "lora_adapter": f"{LORA} optimizations.lora.export=adapter",
    "ema": EMA,
    "ema_warmup": EMA_WARMUP,
    "freeze": "optimizations.freeze=['blocks.0.*',embedding.weight]",
    "replace": "optimizations.replace=[{match:torch.nn.RMSNorm,with:replacement.Norm}]",
    "device_map": "optimizations.device_map.budgets={cpu:null}",
    "compile": "optimizations.compile.scope=blocks optimizations.compile.backend=aot_eager",
    "fp8": "optimizations.fp8.enabled=true optimizations.fp8.emulate=true",
    "fp16": "trainer.precision=fp16",
    "bf16": "trainer.precision=bf16",
    "accumulate": "trainer.accumulate=2",
    "no_clipping": "trainer.clip_norm=0",
}
OPTIMIZERS = ("sgd", "muon", "schedulefree", "prodigy", "adamw8bit", "adamw8bit_torchao", "adamw_bf16")
SCHEDULERS = {
    "constant": "",
    "noam": WARMUP,
    "onecycle": "",
    "plateau": "scheduler.patience=0 scheduler.threshold=0.5 trainer.eval_every=1",
    "warmup": WARMUP,
}
REPLACEMENT = """import torch


class Norm(torch.nn.RMSNorm):
    def forward(self, x):
        return 1.01 * super().forward(x)
"""


@dataclass(frozen=True)
class Run:
    """A run of the table: it starts with `overrides`, reads commands that are `typed`, and goes on with `then`.

    With `is_saved` it is opened by `runner.evaluate` and `runner.export` when it has ended.
    """

    name: str
    overrides: Sequence[str | Spellings]
    then: str = ""
    typed: str = ""
    is_saved: bool = False


class RunFailedError(Exception):
    """A run without digests; the text says why."""


def make_runs() -> Iterator[Run]:
    """Yields the table of runs."""
    for name, overrides in EXPERIMENTS.items():
        yield Run(name, [overrides], is_saved=True)
        yield Run(f"{name}-ddp", [overrides, DDP], is_saved=name == "byte_gpt")
        yield Run(f"{name}-fsdp", [overrides, FSDP], is_saved=name == "byte_gpt")
    for name, overrides in OPTIMIZATIONS.items():
        yield Run(f"byte_gpt-{name}", [BYTE_GPT, overrides], is_saved=name in ("lora", "ema", "replace", "fp16"))
    for name in ("unsloth", "lora", "ema", "accumulate"):
        yield Run(f"byte_gpt-ddp-{name}", [BYTE_GPT, DDP, OPTIMIZATIONS[name]])
        yield Run(f"byte_gpt-fsdp-{name}", [BYTE_GPT, FSDP, OPTIMIZATIONS[name]])
    yield Run("byte_gpt-fsdp-param_dtype", [BYTE_GPT, FSDP, "distributed.strategy.param_dtype=bf16"])
    yield Run("byte_gpt-fsdp-muon", [BYTE_GPT, FSDP, "optimizer=muon"])
    engines = "+engines.first={} +optimizer@engines.second.optimizer=sgd"
    yield Run("byte_gpt-engines", [BYTE_GPT, engines], is_saved=True)
    yield Run("digits-ema", [DIGITS, EMA], is_saved=True)
    yield Run("digits-accumulate", [DIGITS, "trainer.accumulate=2"])
    yield Run("digits-workers", [DIGITS, "data.num_workers=2"])
    yield Run("audio_codes-unsloth", [AUDIO_CODES, OPTIMIZATIONS["unsloth"]])

    for name in OPTIMIZERS:
        scheduler = "scheduler=constant" if name == "schedulefree" else WARMUP
        yield Run(f"byte_gpt-{name}", [TEXT, f"optimizer={name} {scheduler}"], is_saved=name == "schedulefree")
    for name, overrides in SCHEDULERS.items():
        yield Run(f"byte_gpt-{name}", [TEXT, f"scheduler={name} {overrides}"])
    for name in ("pool", "random", "random sampler.replacement=true", "ordered", "batched_ordered"):
        yield Run(f"byte_gpt-{name.replace(' sampler.', '-')}", [BYTE_GPT, SEVERAL_EPOCHS, f"sampler={name}"])
    yield Run("digits-pool", [DIGITS, "sampler=pool"])
    for name in ("unrolled", "musiclm", "vall_e"):
        yield Run(f"audio_codes-{name}", [AUDIO_CODES, f"pattern={name}"])

    half, resume = "trainer.steps=3", "resume=run trainer.steps=6"
    for name, overrides in EXPERIMENTS.items():
        yield Run(f"{name}-resumed", [overrides, half], then=resume, is_saved=name == "byte_gpt")
    yield Run("byte_gpt-resumed-pool", [BYTE_GPT, SEVERAL_EPOCHS, half, "sampler=pool"], then=resume)
    for name in ("fp16", "ema"):
        yield Run(f"byte_gpt-resumed-{name}", [BYTE_GPT, half, OPTIMIZATIONS[name]], then=resume)
    yield Run("byte_gpt-ddp-resumed", [BYTE_GPT, DDP, half], then=resume)
    yield Run("byte_gpt-ddp-resumed_on_one", [BYTE_GPT, DDP, half], then=f"{resume} distributed=single")
    yield Run("byte_gpt-fsdp-resumed_on_one", [BYTE_GPT, FSDP, half], then=f"{resume} distributed=single")
    yield Run("byte_gpt-init_from", [BYTE_GPT], then=f"{BYTE_GPT} init_from=run hydra.run.dir=second")
    typed = "lr 1e-3@2\neval@2\nsave@4\nexport@5\nquit@5\n"
    yield Run("byte_gpt-typed", [BYTE_GPT, "tracking.stdin=true"], typed=typed, then=resume)


def make_speech(folder: Path) -> None:
    """Writes 12 sounds of a second, each of another pitch, with noise."""
    folder.mkdir()
    for number in range(12):
        generator = random.Random(number)
        samples = []
        for index in range(16000):
            angle = 2 * math.pi * index / 16000
            tone = math.sin((100 + 20 * number) * angle) * math.sin(3 * angle) ** 2
            samples.append(int(9000 * tone + 300 * generator.uniform(-1, 1)))
        with wave.open(str(folder / f"{number:02}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", None))
            file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


class Tree:
    """A checkout, and the temporary folder that its runs work in."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.choose = functools.cache(self._choose)

    def start(self, folder: Path, *command: str, typed: str = "") -> str:
        """Runs Python to its end in a folder; returns what it printed."""
        settings = {"PYTHONPATH": self.root, "OMP_NUM_THREADS": "1"}
        settings |= {"XDG_STATE_HOME": folder / "state", "XDG_CACHE_HOME": folder / "cache"}
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, input=typed, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
        )  # fmt: skip
        if done.returncode:
            raise RunFailedError(f"{' '.join(command)}\n{done.stdout}exit status {done.returncode}")
        return done.stdout

    def check(self) -> None:
        """Exits where Python would import another tree's runner."""
        found = self.start(self.folder, "-c", "import runner; print(runner.__file__)").strip()
        if not Path(found).is_relative_to(self.root):
            sys.exit(f"{self.root}: expected the root of a checkout, found that Python imports {found}")

    def _choose(self, spellings: Spellings) -> str:
        """Returns the first spelling that the config of this tree accepts."""
        refusals = []
        for spelling in spellings:
            try:
                self.start(self.folder, "-m", "runner", "--cfg", "job", *spelling.split())
                return spelling
            except RunFailedError as error:
                refusals.append(str(error))
        raise RunFailedError("\n".join(refusals))

    def digest(self, run: Run) -> str:
        """Carries out a run; returns its digests."""
        folder = self.folder / run.name
        folder.mkdir()
        (folder / "replacement.py").write_text(REPLACEMENT)
        overrides = [part if isinstance(part, str) else self.choose(part) for part in run.overrides]
        self.start(folder, "-m", "runner", *" ".join(overrides).split(), "hydra.run.dir=run", typed=run.typed)
        if run.then:
            self.start(folder, "-m", "runner", *run.then.split())
        printed = ""
        if run.is_saved:
            printed = self.start(folder, "-m", "runner.evaluate", "run")
            self.start(folder, "-m", "runner.export", "run", "--output", "exported")
        return "  ".join(f"{kind}={digest}" for kind, digest in make_digests(folder, printed).items())


def make_digests(folder: Path, printed: str) -> dict[str, str]:
    """Returns the digests of what the runs in a folder left, and of what an evaluation printed."""
    metrics = [line for path in sorted(folder.glob("*/metrics.jsonl")) for line in read_metrics(path)]
    metrics += re.findall(r"^eval/\S+ \S+$", printed, re.MULTILINE)
    metrics += sorted(hash_bytes(path.read_bytes()) for path in folder.glob("*/audio/*.wav"))
    paths = [*folder.glob("*/exports/*.safetensors"), *folder.glob("exported/*.safetensors")]
    for checkpoints in folder.glob("*/checkpoints"):
        paths += max(checkpoints.glob("step_*")).rglob("*.safetensors")
    weights, optimizer = list[str](), list[str]()
    for path in paths:
        for name, digest in hash_tensors(path):
            # a shard of FSDP holds both kinds, under <engine>/ and <engine>.optimizer/
            is_of_optimizer = ".optimizer." in path.name or ".optimizer/" in name
            (optimizer if is_of_optimizer else weights).append(digest)
    values = {"metrics": metrics, "weights": sorted(weights), "optimizer": sorted(optimizer)}
    if absent := [kind for kind, found in values.items() if not found]:
        raise RunFailedError(f"the run left no {' and no '.join(absent)}")
    return {kind: hash_bytes("\n".join(found).encode())[:16] for kind, found in values.items()}


def read_metrics(path: Path) -> Iterator[str]:
    """Yields the lines of metrics as canonical JSON, without what changes from run to run."""
    for line in path.read_text().splitlines():
        numbers = {key: value for key, value in json.loads(line).items() if key.split("/")[-1] not in TIME_LIKE_KEYS}
        yield json.dumps(numbers, sort_keys=True, separators=(",", ":"))


def hash_tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and digest of each tensor of a SafeTensors file."""
    content = path.read_bytes()
    (header_size,) = struct.unpack("<Q", content[:8])
    data = content[8 + header_size :]
    for name, entry in json.loads(content[8 : 8 + header_size]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, hash_bytes(f"{entry['dtype']} {entry['shape']} ".encode() + data[start:end])


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe(tree: Tree, run: Run) -> tuple[str, str]:
    """Returns the line of a run, and why it failed."""
    try:
        return f"{run.name}  {tree.digest(run)}", ""
    except Exception as error:  # whatever it is, the other runs go on
        lines = f"{type(error).__name__}: {error}".splitlines()
        return f"{run.name}  FAILED", "\n".join(lines[-NUM_LINES_OF_FAILURE:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parents[1], help="root of a checkout")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="glob over the names of runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time")
    asked = parser.parse_args()
    runs = [run for run in make_runs() if fnmatchcase(run.name, asked.only)]
    if not runs:
        names = ", ".join(run.name for run in make_runs())
        parser.error(f"--only={asked.only}: no run has such a name; there are: {names}")
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as executor:
        tree = Tree(asked.tree.resolve(), Path(folder).resolve())
        tree.check()
        make_speech(tree.folder / "speech")
        for line, failure in executor.map(functools.partial(describe, tree), runs):
            print(line, flush=True)
            if failure:
                num_failed += 1
                print(f"{line}\n{failure}", file=sys.stderr, flush=True)
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
