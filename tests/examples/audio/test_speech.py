"""Speech as waves: sentences where espeak-ng is installed, folders of audio files, and resampling."""

import math
import shutil
import sys
import wave as wave_format
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.examples.audio import speech
from runner.examples.audio.audio_codec import to_pcm, write_wav
from runner.examples.audio.speech import Source, Speech, in_validation, list_sentences, resample

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def tone(frequency: float, seconds: float, rate: int) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate), dtype=torch.float64) / rate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight WAV files of 1.0 to 2.4 s at two rates, one too short, and what is no audio."""
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    (tmp_path / "deeper").mkdir()
    for index in range(8):
        rate = (16000, 44100)[index % 2]
        place = tmp_path / ("deeper" if index > 5 else "") / f"{index}.wav"
        write_wav(place, tone(200 + 100 * index, 1 + 0.2 * index, rate), rate)
    write_wav(tmp_path / "short.WAV", tone(200, 0.3, 16000), 16000)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


@needs_espeak
def test_the_same_settings_give_the_same_speech() -> None:
    first, again = Speech("train", minutes=0.2), Speech("train", minutes=0.2)
    assert first.names == again.names
    assert all(torch.equal(one["wave"], other["wave"]) for one, other in zip(first, again, strict=True))


@needs_espeak
def test_speech_is_as_long_as_asked_for_and_sorted_by_length() -> None:
    dataset = Speech("validation", Source(shortest_s=1.5, longest_s=3.0), minutes=0.3)
    lengths = [len(sample["wave"]) for sample in dataset]
    assert lengths == sorted(lengths)
    assert lengths[0] >= 24000
    assert lengths[-1] <= 48000
    assert 0.3 * 60 <= sum(lengths) / 16000 < 0.3 * 60 + 3
    assert all(0.1 < sample["wave"].abs().max() < 0.9 for sample in dataset)


@needs_espeak
def test_splits_share_no_sentence() -> None:
    train, validation = Speech("train", minutes=0.5), Speech("validation", minutes=0.5)
    assert not set(train.names) & set(validation.names)
    assert set(train.names) | set(validation.names) <= set(list_sentences())


@needs_espeak
def test_a_sentence_is_spoken_without_code_by_one_of_several_voices() -> None:
    sentences = list_sentences()
    assert len(sentences) > 200
    assert all(40 <= len(sentence) <= 120 and not set(sentence) & set('_()*`"0123456789') for sentence in sentences)
    waves = [speech.speak(sentence)[0] for sentence in sentences[:3]]
    assert len({len(wave) for wave in waves}) == 3


def test_a_machine_without_espeak_says_what_to_install_or_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"apt-get install espeak-ng \(Debian\), or set path to a folder"):
        Speech("train")


def test_an_espeak_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "espeak-ng"
    script.write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(OSError, match="failed: no such voice"):
        Speech("train")


def test_a_python_without_its_documentation_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"no pydoc_data\.topics.*set path"):
        list_sentences()


def test_the_files_of_a_folder_are_read_cut_and_resampled(folder: Path) -> None:
    source = Source(str(folder), validation_fraction=0.0, longest_s=2.0)
    dataset = Speech("train", source, minutes=None)
    # 2.2 and 2.4 s are cut after 2 s, and what is left of them is too short.
    expected = sorted([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0, 2.0])
    assert [len(sample["wave"]) / 16000 for sample in dataset] == pytest.approx(expected, abs=1e-4)
    assert {"0.wav", "deeper/7.wav"} <= set(dataset.names)
    by_name = dict(zip(dataset.names, dataset, strict=True))
    for index in (0, 1):
        wave = by_name[f"{index}.wav"]["wave"]
        assert (wave - tone(200 + 100 * index, 1 + 0.2 * index, 16000))[200:-200].abs().max() < 1e-3


def test_splits_share_no_file_and_cover_the_folder(folder: Path) -> None:
    halves = [Speech(split, Source(str(folder), 0.5), minutes=None) for split in ("train", "validation")]
    names = [set(half.names) for half in halves]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {"0.wav", "1.wav", "2.wav", "3.wav", "4.wav", "5.wav", "deeper/6.wav", "deeper/7.wav"}


def test_a_names_split_never_changes() -> None:
    # Fixed values: another checksum would move files between the splits of runs that are compared.
    assert [name for name in "abcdef" if in_validation(f"{name}.wav", 0.5)] == ["a", "d", "e"]
    names = [f"speaker/{index}.flac" for index in range(10_000)]
    assert sum(in_validation(name, 0.1) for name in names) == pytest.approx(1000, abs=100)
    assert not any(in_validation(name, 0.0) for name in names)
    assert all(in_validation(name, 1.0) for name in names)


def test_the_key_changes_with_a_file(folder: Path) -> None:
    before = Source(str(folder)).key()
    assert Source(str(folder)).key() == before
    assert Source(str(folder), longest_s=2.0).key() != before
    write_wav(folder / "0.wav", tone(200, 1.1, 16000), 16000)
    assert Source(str(folder)).key() != before


def test_several_channels_are_averaged(folder: Path) -> None:
    place = folder / "only" / "stereo.wav"
    place.parent.mkdir()
    left, right = to_pcm(tone(300, 1.0, 16000)), to_pcm(tone(500, 1.0, 16000))
    with wave_format.open(str(place), "wb") as file:
        file.setparams((2, 2, 16000, 0, "NONE", ""))
        file.writeframes(torch.stack((left, right), 1).numpy().tobytes())
    dataset = Speech("train", Source(str(place.parent), 0.0))
    expected = (left.float() + right.float()) / 2 / 32768
    assert (dataset[0]["wave"] - expected).abs().max() < 1e-4


def test_a_folder_without_usable_audio_is_reported(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.flac, \.mp3, \.ogg, \.wav file under .*nowhere"):
        Speech("train", Source(str(folder / "nowhere")))
    with pytest.raises(ValueError, match="validation split has 0 of 9 files and no piece of 1 s or more"):
        Speech("validation", Source(str(folder), 0.0))
    with pytest.raises(ValueError, match="train split has 9 of 9 files and no piece of 5 s"):
        Speech("train", Source(str(folder), 0.0, shortest_s=5.0))
    (folder / "0.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"0\.wav can't be read as audio"):
        Speech("train", Source(str(folder), 0.0), minutes=None)


def test_a_folder_without_soundfile_names_the_extra(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r'pip install "exact-runner\[audio\]"'):
        Speech("train", Source(str(folder), 0.0))


@pytest.mark.parametrize(
    ("rate", "new_rate"),
    [(22050, 16000), (44100, 16000), (48000, 16000), (8000, 16000), (11025, 24000), (16000, 16000)],
)
def test_resampling_keeps_a_tone_in_place(rate: int, new_rate: int) -> None:
    for frequency in (100.0, 1000.0, 3500.0):
        resampled = resample(tone(frequency, 1.01, rate), rate, new_rate)
        assert resampled.dtype == torch.float32
        assert len(resampled) == math.ceil(round(1.01 * rate) * new_rate / rate)
        expected = tone(frequency, 2.0, new_rate)[: len(resampled)]
        # Away from the ends, where the tone is cut and its spectrum is wide.
        assert (resampled - expected)[500:-500].abs().max() < 2e-3


def test_resampling_does_not_alias() -> None:
    above = resample(tone(9500.0, 1.0, 44100), 44100, 16000)
    assert above[500:-500].abs().max() < 2e-3


def test_resampling_nothing_gives_nothing() -> None:
    assert resample(torch.zeros(0), 44100, 16000).shape == (0,)
    assert resample(torch.ones(1), 44100, 16000).shape == (1,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 5}, "validation_fraction is 0 to 1, not 5"),
        ({"shortest_s": 0.0}, "expected 0.1 <= shortest_s <= longest_s, found 0.0 and 6.0"),
        ({"longest_s": 0.5}, "found 1.0 and 0.5"),
        ({"longest_s": math.inf}, "found 1.0 and inf"),
        ({"sample_rate": 0}, "sample_rate is at least 1, not 0"),
    ],
)
def test_a_wrong_setting_of_a_source_is_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**settings)  # type: ignore[arg-type]


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="split is one of train, validation, not 'test'"):
        Speech("test")
    with pytest.raises(ValueError, match="minutes is above 0, or None for all, not 0"):
        Speech("train", minutes=0)
