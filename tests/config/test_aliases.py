"""Run folders, configs and programs of before modules were moved and functions renamed keep working."""

import importlib
import subprocess
import sys

import pytest
from conftest import read_metrics, read_numbers

from runner import evaluate, export
from runner.config import aliases

# What a run of before wrote, with a DDP strategy, LoRA and EMA.
CONFIG = """\
name: mine
seed: 0
resume: null
resume_allow_changes: false
allow_targets: []
sign: false
init_from: null
model:
  _target_: own.Model
data:
  train:
    _target_: own.Data
    length: 50
  eval:
    _target_: own.Data
    length: 20
  batch_size: 8
  num_workers: 0
  collate: null
  seed_samples: true
sampler:
  _target_: runner.utils.sampler.BatchedOrderedSampler
  max_size: null
  max_cost: 40
  cost: padded
  shuffle: true
  drop_last: false
  oversized: error
  seed: ${seed}
pattern: null
optimizer:
  _target_: torch.optim.AdamW
  lr: 0.01
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.1
scheduler:
  _target_: runner.engines.schedulers.warmup_cosine
  warmup_steps: 3
  total_steps: ${trainer.steps}
  final_factor: 0.1
optimizations:
  freeze: []
  freeze_mode: eval
  lora:
    rank: 2
    alpha: null
    dropout: 0.0
    include:
    - first
    exclude: []
    also_train: []
    export: merged
  replace: []
  fp8:
    enabled: false
    include: null
    exclude: []
    recipe: tensorwise
    emulate: false
  device_map:
    budgets: null
    bytes_factor: 4.0
  compile:
    scope: 'off'
    backend: inductor
    mode: null
    dynamic: null
  unsloth: false
  checkpointing: none
  ema:
    decay: 0.9
    warmup: false
distributed:
  device: auto
  nproc_per_node: 2
  nnodes: 1
  rdzv_endpoint: null
  rdzv_timeout_s: 900.0
  backend: auto
  max_restarts: 3
  timeout_s: 600.0
  strategy:
    _target_: runner.engines.layouts.DDP
    bucket_cap_mb: 25.0
    find_unused_parameters: false
    static_graph: false
    broadcast_buffers: true
    gradient_as_bucket_view: true
trainer:
  steps: 6
  accumulate: 1
  clip_norm: 1.0
  precision: fp32
  log_every: 1
  save_every: 4
  eval_every: 6
  eval_at_start: true
  export_every: 6
  keep_last: 0
  keep_every: 0
  keep_best: 0
  best_metric: null
  best_mode: min
  on_nonfinite: stop
  on_oom: stop
  max_skips: 100
checkpoint:
  format: sft
tracking:
  tensorboard: true
  jsonl: true
  progress: true
  stdin: auto
engines: {}
feeder: null
report:
  _target_: own.report
"""
OVERRIDES = """\
- experiment=mine
- distributed=ddp
- distributed.nproc_per_node=2
- sampler=batched_ordered
- sampler.max_size=null
- sampler.max_cost=40
- optimizations.lora.rank=2
- optimizations.ema.decay=0.9
- +optimizations.lora.include=[first]
- optimizer=adamw
- trainer.steps=6
- trainer.export_every=6
- trainer.eval_every=6
"""
HYDRA = """\
hydra:
  callbacks:
    run_folder:
      _target_: runner.launch.RunFolder
      swept: null
  runtime:
    choices:
      experiment: mine
      distributed: ddp
      optimizer: adamw
      sampler: batched_ordered
"""
OPTIONS = [
    "distributed=ddp",
    "distributed.nproc_per_node=2",
    "sampler=batched_ordered",
    "sampler.max_size=null",
    "sampler.max_cost=40",
    "optimizations.lora.rank=2",
    "optimizations.lora.include=[first]",
    "optimizations.ema.decay=0.9",
    "trainer.steps=6",
    "trainer.export_every=6",
]


@pytest.fixture
def run_of_before(project):
    """A run that was cut at step 4, with the config of before; and the same run to its end, in `whole`."""
    project.run(*OPTIONS, "hydra.run.dir=whole", forks_workers=True)
    project.run(*OPTIONS, "hydra.run.dir=run", typed="quit@4\n", forks_workers=True)
    folder = project.folder / "run" / ".hydra"
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "overrides.yaml").write_text(OVERRIDES)
    (folder / "hydra.yaml").write_text(HYDRA)
    return project


def test_a_run_of_before_is_resumed_evaluated_and_exported(run_of_before, monkeypatch, capsys):
    monkeypatch.chdir(run_of_before.folder)
    monkeypatch.syspath_prepend(run_of_before.folder)
    printed = run_of_before.run("resume=run", "sign=true", *OPTIONS, forks_workers=True)
    assert printed.startswith("Going on after step 4")  # the config has the same values as before
    assert read_numbers(run_of_before.folder / "run") == read_numbers(run_of_before.folder / "whole")
    (run_of_before.folder / "run" / ".hydra" / "config.yaml").write_text(CONFIG)
    evaluate.main(["run", "--allow-targets", "own"])
    last = read_metrics(run_of_before.folder / "whole")[-1]
    assert f"eval/loss {last['eval/loss']}\n" in capsys.readouterr().out
    export.main(["run", "--allow-targets", "own", "--output", "out"])
    exported, whole = (run_of_before.folder / path / "model.safetensors" for path in ("out", "whole/exports"))
    assert exported.read_bytes()[-100:] == whole.read_bytes()[-100:]


def test_each_earlier_path_of_a_module_is_the_module():
    for old, new in aliases.MOVED.items():
        assert importlib.import_module(old) is importlib.import_module(new), old


def test_each_earlier_name_is_the_same_object():
    for module, names in aliases.RENAMED.items():
        found = importlib.import_module(module)
        for old, new in names.items():
            assert getattr(found, old) is getattr(found, new), f"{module}.{old}"
    with pytest.raises(ImportError, match="cannot import name 'is_leeder'"):
        from runner.utils.distributed import is_leeder  # noqa: F401


IMPORTS = """
from runner.engines.averages import Averages
from runner.engines.layouts import DDP, Alone
from runner.engines.sharded import FSDP
from runner.engines.settings import lrs, put
from runner.examples.speech_codes import Encoded, SpeechCodes
from runner.utils.agreement import Agreement
from runner.utils.batches import slice_of
from runner.utils.device_map import DeviceMap
from runner.utils.distributed import connect, kept_generators, wait_for
from runner.utils.distributed import gather, is_leader, is_many, num_ranks, of_leader, together
from runner.utils.io import load, save
from runner.utils.lora import add_lora
from runner.utils.media import Audio
from runner.utils.memory import describe, mib
from runner.utils.mishaps import Elsewhere
from runner.utils.packing import Packed, Snapshot, unpack
from runner.utils.recompute import Block
from runner.utils.sampler import BatchedOrderedSampler, RandomSampler
from runner.utils.samples import Samples
from runner.utils.selection import fits
from runner.utils.train import Loop, Stop
from runner.utils.unsloth import Report, apply, unwrap, wrap
from runner.utils.utils import mix
from runner.utils.wrapper import freeze, optimize

assert (num_ranks(), is_leader(), is_many(), gather(1), together(lambda: 2)) == (1, True, False, [1], [2])
assert (slice_of(5, 1, 2), mib(2**20), fits(["a.1"], ["a.?"])) == ((2, 5), "1.00 MiB", True)
packed = Packed({"a": 1})
assert unpack(packed.document, packed.tensors) == {"a": 1} and issubclass(Snapshot, Packed)
with kept_generators():
    pass
assert DDP.__module__ == "runner.engines.strategies" and issubclass(DDP, Alone)
"""


def test_a_program_imports_what_it_did():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("runner.engines.layouts.DDP", "runner.engines.strategies.DDP"),
        ("runner.engines.layouts.Alone", "runner.engines.strategies.Strategy"),
        ("runner.engines.sharded.FSDP", "runner.engines.fsdp.FSDP"),
        ("runner.utils.sampler.RandomSampler", "runner.utils.sampler.RandomSampler"),
        ("runner.examples.speech_codes.SpeechCodes", "runner.examples.audio.speech_codes.SpeechCodes"),
        ("runner.engines.layoutsmore.X", "runner.engines.layoutsmore.X"),
        ("a." * 100_000 + "a", "a." * 100_000 + "a"),
        ("own", "own"),
        ("", ""),
    ],
    ids=lambda path: path[:60],
)
def test_paths_in_a_config_become_todays(old, new):
    before = {"a": [{"_target_": old, "path": old}], "replace": [{"match": old, "with": old}]}
    after = {"a": [{"_target_": new, "path": old}], "replace": [{"match": new, "with": new}]}
    assert aliases.update_paths(before) == after


def test_a_strategy_of_a_user_with_methods_of_before_is_refused_by_name():
    from runner.engines.layouts import Alone

    with pytest.raises(TypeError, match="Mine: methods of a strategy were renamed: place is shard now, wrap is wrap_f"):
        type("Mine", (Alone,), {"place": None, "wrap": None})
