"""`experiment=audio_codes` in whole runs, on audio files that the test makes: every pattern, resumed, heard."""

import shutil
import sys

import numpy as np
import pytest
import torch
from audio_overrides import SMALL_AUDIO_CODES
from conftest import Project, read_numbers
from tensorboard.compat.proto.event_pb2 import Event

from runner import evaluate
from runner.examples.audio.audio_codec import read_wav, write_wav
from runner.run import evaluation, saved_model
from runner.tracking.event_file import find_event_files, read_records

PATTERNS = ["parallel", "delayed", "unrolled", "coarse_first", "musiclm", "vall_e"]


class AudioCodes(Project):
    command = property(lambda self: [sys.executable, "-m", "runner", *SMALL_AUDIO_CODES])
    loaded = ("runner.examples.audio.speech_codes", "soundfile")


@pytest.fixture
def project(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    made, generator = AudioCodes(tmp_path), torch.Generator().manual_seed(0)
    (tmp_path / "speech").mkdir()
    for number in range(12):
        time = torch.arange(16000) / 16000
        pitch = 100 + 20 * number + 30 * torch.rand((), generator=generator) * time
        pulses = torch.sin(2 * torch.pi * pitch * time).sign() * torch.sin(2 * torch.pi * 3 * time) ** 2
        write_wav(
            tmp_path / "speech" / f"{number:02}.wav", 0.3 * pulses + 0.01 * torch.randn(16000, generator=generator)
        )
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_trains_and_each_codebook_has_its_loss(project, pattern):
    project.run(f"pattern={pattern}", "hydra.run.dir=run", "trainer.steps=2")
    (first, *_, last) = [line for line in read_numbers(project.folder / "run") if "eval/loss" in line]
    own = [last[f"eval/loss_{number}"] for number in (1, 2, 3)]
    assert last["eval/loss"] == pytest.approx(sum(own) / 3)
    assert abs(first["eval/loss"] - np.log(8)) < 0.1


def test_it_resumes_exactly_evaluates_to_the_same_loss_and_writes_sounds(project):
    printed = project.run("hydra.run.dir=run")
    folder = project.folder / "run"
    shutil.copytree(folder, project.folder / "again")
    project.run("resume=again/checkpoints/step_00000002")
    assert read_numbers(project.folder / "again") == read_numbers(folder)
    for name in ("model.safetensors", "model.optimizer.safetensors"):
        one, other = (each / "checkpoints/step_00000004" / name for each in (folder, project.folder / "again"))
        assert one.read_bytes() == other.read_bytes()

    (last,) = [line for line in read_numbers(folder) if line["step"] == 4 and "eval/loss" in line]
    found, shown = evaluation.evaluate(saved_model.open_checkpoint(folder))
    assert {name: value for name, value in last.items() if name.startswith("eval/")} == found

    names = ("original", "round_trip", "continuation")
    for name in names:
        path = folder / "audio" / f"{name}-00000004.wav"
        assert f"eval/{name}: {path}" in printed
        wave, sample_rate = read_wav(path)
        assert sample_rate == 16000
        assert len(wave) >= 0.3 * 16000 - 320
        assert path.read_bytes() == shown[f"eval/{name}"].encode()
    (events,) = find_event_files(folder)
    with open(events, "rb") as file:
        values = [value for record in read_records(file) for value in Event.FromString(record).summary.value]
    sounds = {value.tag: value.audio for value in values if value.HasField("audio")}
    assert sounds.keys() == {f"eval/{name}" for name in names}
    path = folder / "audio" / "original-00000004.wav"
    assert sounds["eval/original"].encoded_audio_string == path.read_bytes()
    assert sounds["eval/original"].content_type == "audio/wav"


def test_changed_data_is_rejected_or_reported(project, capsys):
    project.run("hydra.run.dir=run", "trainer.export_every=4")
    write_wav(project.folder / "speech" / "00.wav", torch.randn(16000) * 0.1)
    printed = project.run("resume=run", "trainer.steps=6", status=2)
    assert "SpeechCodes: its data is not what the run was trained on" in printed
    for place in ("run", "run/exports/model.safetensors"):
        evaluate.main([place, "report.continued_s=0.1"])
        assert "SpeechCodes: its data is not what the run was trained on" in capsys.readouterr().err
    assert "not what the run" in project.run("resume=run", "trainer.steps=6", "resume_allow_changes=true")


def test_a_pattern_that_the_model_does_not_accept_is_reported(project):
    given = ["pattern={_target_:runner.utils.pattern.Parallel,num_codebooks:2}", "model.pattern=null"]
    assert "pattern: nothing takes it" in project.run(*given, "hydra.run.dir=run", status=2)


def test_a_folder_without_audio_is_reported(project):
    (project.folder / "empty").mkdir()
    assert "data.train: " in project.run("data.train.path=empty", "hydra.run.dir=run", status=2)
    assert not (project.folder / "run").exists()
