"""Every choice of every config group in a cycle: train, interrupt, resume, evaluate and export, bit for bit.

The cycles are made from the files of conf/, so that a new choice is tested without a change here.
"""

import functools
import re
from itertools import zip_longest

import pytest
import torch
from audio_overrides import SMALL_AUDIO_CODES
from choices import Choices, assert_same_parts, load_parts
from conftest import read_numbers

from runner import evaluate, export
from runner.config.checks import CONF_DIR
from runner.examples.audio.audio_codec import write_wav
from runner.utils import io

STEPS = ["trainer.steps=4", "trainer.save_every=4", "trainer.eval_every=4", "trainer.export_every=4"]
STEPS += ["trainer.log_every=1", "trainer.eval_at_start=false", "distributed.device=cpu"]
SMALL_TEXT = ["model.width=16", "model.depth=2", "model.heads=2", "data.train.context=16", "data.batch_size=4"]
SMALL_TEXT += ["data.eval.max_windows=4", "report.num_bytes=4"]
SMALL_DIGITS = ["experiment=digits", "model.width=4", "data.batch_size=16"]
# Choices that are made for each other, and the values that make each of them small.
FAMILIES = {
    "text": ({"model": "byte_gpt", "data": "source_code", "report": "sample_code"}, SMALL_TEXT),
    "digits": (
        {"experiment": "digits", "model": "digits_net", "data": "digits", "report": "hardest_mistakes"},
        SMALL_DIGITS,
    ),
    "codes": (
        {"experiment": "audio_codes", "model": "code_gpt", "data": "speech_codes", "report": "continuation"},
        [value for value in SMALL_AUDIO_CODES if not value.startswith(("trainer.", "distributed."))],
    ),
}
FAMILIES["gan"] = (
    {"experiment": "gan", "report": "generated_images"},
    ["experiment=gan", "data.batch_size=16", "report.rows=2"],
)
FAMILIES["distill"] = (
    {"experiment": "distill"},
    ["experiment=distill", "data.batch_size=16", "engines.teacher.init_from=null"],
)
FAMILIES["finetune"] = (
    {"experiment": "finetune", "data": "documentation"},
    ["experiment=finetune", "init=null", *SMALL_TEXT],
)
# A choice that is refused beside another one, and one that it goes with.
PARTNERS = {"schedulefree": {"scheduler": "constant"}}
VALUES = {"fast": ["optimizations.compile.backend=aot_eager"]}  # inductor compiles for half a minute
FAMILY_NEEDS = {"digits": "sklearn", "gan": "sklearn", "distill": "sklearn", "codes": "soundfile"}
NEEDS = {"adamw8bit": "bitsandbytes", "adamw8bit_torchao": "torchao", "adamw_bf16": "torchao"}


@functools.cache
def choices(group):
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


# Losses need other batches; callbacks, trackers and optimizations are chosen together. Each kind has tests of its own.
ELSEWHERE = ("hydra", "loss", "callbacks", "trackers", "optimization")
GROUPS = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name not in ELSEWHERE)
IN_FAMILIES = {(group, choice) for family, _ in FAMILIES.values() for group, choice in family.items()}


def cycles():
    """Yields the choices of each cycle by group, with its family."""
    together = ("optimizer", "scheduler", "sampler", "trainer", "tracking", "checkpoint", "ema")
    for row in zip_longest(*map(choices, together)):
        chosen = {group: choice for group, choice in zip(together, row, strict=True) if choice is not None}
        yield "text", chosen | PARTNERS.get(chosen.get("optimizer"), {})
    groups_by_family = {"digits": (), "gan": (), "distill": (), "finetune": (), "codes": ("pattern",)}
    groups_by_family["text"] = ("optimizations", "distributed")
    for family, groups in groups_by_family.items():
        for group in groups:
            yield from ((family, {group: choice}) for choice in choices(group))
        if not groups:
            yield family, {}
    for group in ("model", "data", "report", "experiment"):
        yield from (("text", {group: each}) for each in choices(group) if (group, each) not in IN_FAMILIES)


CYCLES = list(cycles())


def name_of(cycle):
    family, chosen = cycle
    return "-".join([family, *chosen.values()])


def test_every_choice_is_in_a_cycle():
    made = {(group, choice) for family, chosen in CYCLES for group, choice in (FAMILIES[family][0] | chosen).items()}
    assert made == {(group, choice) for group in GROUPS for choice in choices(group)}


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """A folder with sounds of a second."""
    folder = tmp_path_factory.mktemp("speech")
    time = torch.arange(16000) / 16000
    for number in range(12):
        write_wav(folder / f"{number:02}.wav", 0.3 * torch.sin(2 * torch.pi * (100 + 20 * number) * time))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cycle", CYCLES, ids=name_of)
def test_an_interrupted_run_of_every_choice_equals_the_uninterrupted_one(cycle, tmp_path, monkeypatch, capsys, speech):
    (family, chosen), project = cycle, Choices(tmp_path)
    needs = FAMILY_NEEDS.get(family), NEEDS.get(chosen.get("optimizer"))
    for module in filter(None, needs):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    small = [value.replace("path=speech", f"path={speech}") for value in FAMILIES[family][1]]
    values = [value for choice in chosen.values() for value in VALUES.get(choice, [])]
    overrides = [*(f"{group}={choice}" for group, choice in chosen.items()), *small, *STEPS, *values]
    count = 2 if chosen.get("distributed") in ("ddp", "fsdp") else 1
    project.run_on(count, *overrides, "hydra.run.dir=whole")
    project.run_on(count, *overrides, "hydra.run.dir=cut", typed="quit@2\n")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("step_*")] == ["step_00000002"]
    project.run_on(count, "resume=cut")
    engines = {name for name in load_parts(tmp_path / "whole", 4) if "." not in name}
    assert engines == {"gan": {"discriminator", "generator"}, "distill": {"teacher", "student"}}.get(family, {"model"})
    assert_same_parts(tmp_path / "whole", tmp_path / "cut", 4)
    export.main(["cut", "--output", "after"])
    # An optimizer that averages moves the weights to the average and back, which rounds.
    rtol = 1e-5 if chosen.get("optimizer") == "schedulefree" else 0.0
    for engine in engines:
        live, after = (io.load(tmp_path / place / f"{engine}.safetensors") for place in ("cut/exports", "after"))
        assert live.keys() == after.keys()
        for name, tensor in live.items():
            torch.testing.assert_close(after[name], tensor, rtol=rtol, atol=rtol)
    capsys.readouterr()
    evaluate.main(["cut", "distributed.device=cpu"])
    printed = dict(re.findall(r"^(eval/\S+) (\S+)$", capsys.readouterr().out, re.MULTILINE))
    if chosen.get("tracking") != "silent":
        numbers = read_numbers(tmp_path / "whole")
        assert numbers == read_numbers(tmp_path / "cut")
        (logged,) = [line for line in numbers if any(name.startswith("eval/") for name in line)]
        if count == 1:
            assert {name: float(value) for name, value in printed.items()} == {k: logged[k] for k in printed}
    losses = {"gan": {"eval/discriminator/loss", "eval/generator/loss"}, "distill": {"eval/student/loss"}}
    assert losses.get(family, {"eval/loss"}) <= printed.keys()
