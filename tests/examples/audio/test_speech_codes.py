"""Speech as codes: made once, the same for all who ask, and padded into batches."""

import math
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from runner.examples.audio import speech_codes
from runner.examples.audio.audio_codec import MelCodec, write_wav
from runner.examples.audio.speech_codes import Pad, SpeechCodes
from runner.utils import io
from runner.utils.sampler import BatchedOrderedSampler

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small work on one thread: more of them only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_codes, "_cached", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight WAV files of noise, 1.0 to 2.4 s."""
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "audio").mkdir()
    for index in range(8):
        noise = 0.1 * torch.randn(16000 + 3200 * index, generator=generator)
        write_wav(tmp_path / "audio" / f"{index}.wav", noise.cumsum(0).sin() * 0.5)
    return tmp_path / "audio"


def small(folder: Path, split: str = "train", **settings: Any) -> SpeechCodes:
    settings = {"codec": MelCodec(2, 16, num_steps=2), "cache": False, **settings}
    return SpeechCodes(split, str(folder), validation_fraction=0.5, **settings)


def equal(one: SpeechCodes, other: SpeechCodes) -> bool:
    is_same = one.names == other.names and len(one) == len(other)
    return is_same and all(torch.equal(a["codes"], b["codes"]) for a, b in zip(one, other, strict=True))


class EveryTenth:
    """A codec of another kind: one codebook, every tenth sample of 8 kHz."""

    num_codebooks, card, sample_rate, frame_rate = 1, 256, 8000, 800.0

    def encode(self, wave: Tensor) -> Tensor:
        return ((wave[:, None, ::10] + 1) * 127).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes[:, 0] / 127 - 1).repeat_interleave(10, 1)


def test_samples_are_the_codecs_codes_of_the_waves(folder: Path) -> None:
    for split in ("train", "validation"):
        dataset = small(folder, split)
        assert dataset.lengths.dtype == torch.int64
        for index, sample in enumerate(dataset):
            codes, wave = sample["codes"], dataset.wave(index)
            assert (codes.dtype, codes.shape) == (torch.int64, (2, math.ceil(len(wave) / 320)))
            assert torch.equal(codes, dataset.codec.encode(wave))
            assert dataset.lengths[index] == codes.shape[1]


def test_both_splits_of_a_process_share_one_codec_fitted_on_training_speech(folder: Path) -> None:
    train, validation = small(folder), small(folder, "validation")
    assert train.codec is validation.codec
    alone = MelCodec(2, 16, num_steps=2).fit([train.wave(index) for index in range(len(train))])
    assert torch.equal(train.codec.codebooks, alone.codebooks)
    assert not set(train.names) & set(validation.names)


def test_the_same_settings_give_the_same_codes_when_encoded_again(folder: Path) -> None:
    first = small(folder)
    speech_codes._cached.clear()
    assert equal(small(folder), first)


def test_other_settings_are_kept_apart(folder: Path) -> None:
    first = small(folder)
    other = small(folder, codec=MelCodec(2, 16, num_steps=2, seed=1))
    assert other.codec is not first.codec
    assert not equal(first, other)
    small(folder, codec=MelCodec(1, 16, num_steps=2))
    assert len(speech_codes._cached) == 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_cache_gives_the_codes_the_waves_and_the_codec_without_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small(folder, cache=True)
    speech_codes._cached.clear()
    monkeypatch.setattr(speech_codes, "encode_speech", lambda *_: pytest.fail("made again"))
    again = small(folder, cache=True)
    assert equal(first, again)
    assert all(torch.equal(first.wave(index), again.wave(index)) for index in range(len(first)))
    assert torch.equal(again.codec.encode(first.wave(0)), first[0]["codes"])
    assert len(small(folder, "validation", cache=True)) > 0


def test_a_damaged_or_outdated_cache_is_made_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "runner"
    first = small(folder, cache=True)
    (file,) = cache.glob("*.safetensors")
    whole = file.read_bytes()
    for spoil in (lambda: file.write_bytes(whole[: len(whole) // 2]), lambda: io.save({"other": 1}, file)):
        spoil()
        speech_codes._cached.clear()
        assert equal(small(folder, cache=True), first)
        assert len(file.read_bytes()) == len(whole)
    write_wav(folder / "9.wav", torch.zeros(20000))
    speech_codes._cached.clear()
    small(folder, cache=True)
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_cache_that_cannot_be_written_is_ignored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert equal(small(folder, cache=True), small(folder))


def _make(folder: Path, cache: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    made: list[int] = []
    plain = speech_codes.encode_speech
    speech_codes.encode_speech = lambda *given: (made.append(1), plain(*given))[1]
    dataset = small(folder, cache=True)
    answers.put((len(made), [sample["codes"].tolist() for sample in dataset]))


def test_concurrent_processes_encode_once_and_agree(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_make, args=(folder, tmp_path / "cache", answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(made for made, _ in found) == [0, 1]
    assert found[0][1] == found[1][1]


def test_any_object_with_encode_and_decode_takes_the_codecs_place(folder: Path, tmp_path: Path) -> None:
    dataset = small(folder, codec=EveryTenth(), cache=True)
    assert dataset[0]["codes"].dtype == torch.int64
    assert dataset.sample_rate == 8000
    assert (dataset.lengths / 800).tolist() == pytest.approx([len(dataset.wave(i)) / 8000 for i in range(len(dataset))])
    decoded = dataset.codec.decode(dataset[0]["codes"][None])[0]
    assert (decoded[::10] - dataset.wave(0)[::10]).abs().max() < 0.01
    # Nothing says what decides its codes: they are made each time.
    assert not (tmp_path / "cache").exists()


def test_codes_of_a_wrong_shape_name_the_codec(folder: Path) -> None:
    codec = EveryTenth()
    codec.num_codebooks = 3
    with pytest.raises(
        ValueError, match=r"EveryTenth\.encode gave torch\.uint8 \[1, 1, \d+\].*expected integers \[1, 3"
    ):
        small(folder, codec=codec)


def test_pad_fills_shorter_pieces() -> None:
    samples = [{"codes": torch.arange(1, 2 * length + 1).view(2, length)} for length in (3, 5, 1)]
    batch = Pad()(samples)
    assert batch["lengths"] == [3, 5, 1]
    assert (batch["codes"].dtype, batch["codes"].shape) == (torch.int64, (3, 2, 5))
    assert batch["codes"].is_contiguous()
    for sample, codes, length in zip(samples, batch["codes"], batch["lengths"], strict=True):
        assert torch.equal(codes[:, :length], sample["codes"])
        assert not codes[:, length:].any()


def test_a_budget_of_frames_makes_batches_of_neighbours(folder: Path) -> None:
    dataset = small(folder)
    sampler = BatchedOrderedSampler(dataset.lengths, max_cost=300)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=Pad()))
    assert sum(len(batch["lengths"]) for batch in batches) == len(dataset)
    assert all(batch["codes"].shape[0] * batch["codes"].shape[2] <= 300 for batch in batches)


def test_a_sample_owns_its_codes_and_a_pickle_has_the_same(folder: Path) -> None:
    dataset = small(folder)
    before = dataset[0]["codes"].clone()
    dataset[0]["codes"].zero_()
    assert torch.equal(dataset[0]["codes"], before)
    assert equal(pickle.loads(pickle.dumps(dataset)), dataset)


def test_a_wrong_split_is_named() -> None:
    with pytest.raises(ValueError, match="split is one of train, validation, not 'test'"):
        SpeechCodes("test")


def test_the_config_gives_every_setting_of_the_dataset() -> None:
    config = yaml.safe_load((Path(__file__).parents[3] / "conf/data/speech_codes.yaml").read_text())
    taken = set(SpeechCodes.__init__.__annotations__) - {"return"}
    for split in ("train", "eval"):
        assert set(config[split]) - {"_target_"} == taken
    assert config["eval"]["split"] == "validation"


@needs_espeak
def test_generated_speech_is_near_the_original_after_a_round_trip() -> None:
    dataset = SpeechCodes("validation", minutes=1.0, validation_minutes=0.2, codec=MelCodec(4, 128), cache=False)
    codec = dataset.codec
    assert isinstance(codec, MelCodec)
    errors, heard = [], []
    for index in range(len(dataset)):
        vectors, codes = codec.vectors(dataset.wave(index)[None]), dataset[index]["codes"]
        errors.append([(codec.dequantize(codes[None, :count]) - vectors).square().mean() for count in (1, 2, 3, 4)])
        heard.append((codec.vectors(codec.decode(codes)[None]) - vectors).square().mean())
    decibels = torch.tensor(errors).mean(0).sqrt() * 20 / math.log(10)
    assert (decibels.diff() < 0).all()
    assert decibels[3] < LARGEST_DB
    assert torch.stack(heard).mean().sqrt() * 20 / math.log(10) < LARGEST_DB + 1.5


LARGEST_DB = 4.5


def test_the_fingerprint_is_that_of_codec_and_training_speech(folder: Path) -> None:
    first = small(folder)
    assert small(folder, "validation").fingerprint == first.fingerprint
    assert small(folder).fingerprint == first.fingerprint
    assert small(folder, codec=MelCodec(2, 16, num_steps=2, seed=1)).fingerprint != first.fingerprint
