"""The log-mel codec and WAV files: on synthetic voices, so that it runs anywhere."""

import functools
import io
import math
import pickle
import wave as wave_format
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.examples.audio.audio_codec import (
    FRAME,
    NUM_BANDS,
    SAMPLE_RATE,
    MelCodec,
    fit_entries,
    from_pcm,
    mel_bands,
    nearest,
    read_wav,
    to_pcm,
    write_wav,
)


@functools.cache
def voice(seconds: float, seed: int) -> Tensor:
    """Pulses of a gliding pitch through resonances that move: as near to a vowel as a few lines come."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch, *formants = (torch.rand(4, generator=generator) * torch.tensor([120, 500, 1200, 1500])).tolist()
    glide = 90 + pitch + 30 * torch.sin(2 * math.pi * 0.7 * time)
    turn = 2 * math.pi * glide.cumsum(0) / SAMPLE_RATE
    sound = torch.zeros_like(time)
    for harmonic in range(1, 20):
        frequency = harmonic * glide
        for centre, base in zip(formants, (250, 900, 2200), strict=True):
            middle = base + centre * (0.5 + 0.5 * torch.sin(2 * math.pi * 1.3 * time + base))
            sound += torch.exp(-(((frequency - middle) / 150) ** 2)) * torch.sin(harmonic * turn)
    return 0.5 * sound / sound.abs().max()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small work on one thread: more of them only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codec() -> MelCodec:
    return MelCodec(num_codebooks=4, card=64).fit([voice(1.5, seed) for seed in range(12)])


def spectral_error_db(codec: MelCodec, wave: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference of two waves' bands, in decibels."""
    difference = codec.vectors(wave[None]) - codec.vectors(other[None])
    return float(difference.square().mean().sqrt()) * 20 / math.log(10)


@pytest.mark.parametrize("num_samples", [1, 319, 320, 321, 16000])
def test_codes_and_waves_have_the_shapes_that_the_docstrings_say(codec: MelCodec, num_samples: int) -> None:
    frames = math.ceil(num_samples / FRAME)
    wave = voice(1.0, 50)[:num_samples]
    codes = codec.encode(wave)
    assert (codes.dtype, codes.shape) == (torch.int64, (4, frames))
    assert codec.encode(wave.expand(3, -1)).shape == (3, 4, frames)
    assert set(codes.unique().tolist()) <= set(range(codec.card))
    assert (codec.decode(codes).dtype, codec.decode(codes).shape) == (torch.float32, (320 * frames,))
    assert codec.decode(codes.expand(3, -1, -1)).shape == (3, 320 * frames)
    assert codec.frame_rate == 50


def test_codes_and_sound_do_not_depend_on_the_batch(codec: MelCodec) -> None:
    waves = torch.stack([voice(1.0, seed) for seed in (50, 51, 52)])
    codes = codec.encode(waves)
    decoded = codec.decode(codes)
    for each, own_codes, own_wave in zip(waves, codes, decoded, strict=True):
        assert torch.equal(codec.encode(each), own_codes)
        # A phase that is sought in 32 steps carries differences of rounding along.
        assert (codec.decode(own_codes) - own_wave).abs().max() < 1e-2


def test_the_same_audio_gives_the_same_codebooks_and_moves_no_generator(codec: MelCodec) -> None:
    before = torch.get_rng_state()
    again = MelCodec(num_codebooks=4, card=64).fit([voice(1.5, seed) for seed in range(12)])
    assert torch.equal(again.codebooks, codec.codebooks)
    assert torch.equal(again.mean, codec.mean)
    wave = voice(2.0, 50)
    assert torch.equal(again.encode(wave), codec.encode(wave))
    assert torch.equal(again.decode(again.encode(wave)), codec.decode(codec.encode(wave)))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_further_codebook_brings_unseen_audio_nearer(codec: MelCodec) -> None:
    vectors = codec.vectors(voice(3.0, 50)[None])
    codes = codec.encode(voice(3.0, 50))[None]
    errors = [float((codec.dequantize(codes[:, :count]) - vectors).square().mean()) for count in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.6 * errors[0]
    assert errors[0] < 0.5 * float((codec.mean - vectors).square().mean())


def test_codes_are_the_nearest_entries_to_the_residual(codec: MelCodec) -> None:
    wave = voice(1.0, 50)
    left = codec.vectors(wave[None])[0] - codec.mean
    for codebook, codes in zip(codec.codebooks, codec.encode(wave), strict=True):
        distances = torch.cdist(left.double(), codebook.double())
        assert torch.equal(distances.argmin(1), codes)
        left = left - codebook[codes]


def test_a_decoded_wave_has_the_requested_spectrum(codec: MelCodec) -> None:
    wave = voice(3.0, 50)
    unquantized = codec.reconstruct(codec.vectors(wave[None]))[0]
    assert spectral_error_db(codec, wave, unquantized) < 3.5
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0)) * wave.std()
    decoded = codec.decode(codec.encode(wave))
    assert spectral_error_db(codec, wave, decoded) < 0.4 * spectral_error_db(codec, wave, noise)
    assert float(decoded.std()) == pytest.approx(float(wave.std()), rel=0.25)


def test_silence_stays_silent(codec: MelCodec) -> None:
    silence = torch.zeros(1, 6400)
    assert codec.reconstruct(codec.vectors(silence)).abs().max() < 1e-4


def test_any_codes_are_decoded_to_something_finite(codec: MelCodec) -> None:
    codes = torch.randint(codec.card, (4, 4, 100), generator=torch.Generator().manual_seed(0))
    assert codec.decode(codes).isfinite().all()
    assert codec.reconstruct(torch.full((1, 10, 160), 100.0)).isfinite().all()


def test_codes_of_the_first_codebooks_alone_are_decoded(codec: MelCodec) -> None:
    codes = codec.encode(voice(1.0, 50))
    assert codec.decode(codes[:2]).shape == (16000,)
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_a_state_dict_or_a_pickle_carries_all_that_was_fitted(codec: MelCodec) -> None:
    other = MelCodec(num_codebooks=4, card=64)
    other.load_state_dict(codec.state_dict())
    wave = voice(1.0, 50)
    assert set(codec.state_dict()) == {"codebooks", "mean"}
    assert torch.equal(other.encode(wave), codec.encode(wave))
    assert torch.equal(pickle.loads(pickle.dumps(codec)).encode(wave), codec.encode(wave))


def test_keys_differ_where_codes_do() -> None:
    keys = {MelCodec(**{name: 7}).key for name in ("num_codebooks", "card", "num_steps", "vectors_per_entry", "seed")}
    assert len(keys | {MelCodec().key}) == 6
    assert MelCodec(num_phase_steps=3).key == MelCodec().key


@pytest.mark.parametrize("name", ["num_codebooks", "num_steps", "vectors_per_entry", "num_phase_steps"])
def test_a_setting_below_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1 and card at least 2"):
        MelCodec(**{name: 0})


def test_invalid_waves_and_codes_are_reported(codec: MelCodec) -> None:
    with pytest.raises(ValueError, match=r"fit\(waves\) or load_state_dict comes before encode"):
        MelCodec().encode(torch.zeros(320))
    for shape in ((0,), (2, 0), (1, 1, 320)):
        with pytest.raises(ValueError, match=r"audio is \[samples\] or \[batch, samples\], found"):
            codec.encode(torch.zeros(shape))
    for shape in ((5, 10), (1, 5, 10), (10,)):
        with pytest.raises(ValueError, match="with 1 to 4 codebooks, found"):
            codec.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"64 entries need as many frames, found 50, 1\.0 s of audio"):
        MelCodec(card=64).fit([voice(1.0, 0)])
    with pytest.raises(ValueError, match="found 0"):
        MelCodec(card=64).fit([])


def test_k_means_finds_clusters_and_leaves_no_entry_empty() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    generator = torch.Generator().manual_seed(0)
    # The start is four vectors of one cluster, two of them equal: entries have to move.
    vectors = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=generator)
    vectors[1] = vectors[0]
    entries = fit_entries(vectors, 4, 20)
    codes, distances = nearest(vectors, entries)
    assert torch.bincount(codes, minlength=4).min() > 0
    assert torch.allclose(distances, (vectors - entries[codes]).square().sum(1), atol=1e-4)


def test_bands_each_weigh_1_and_rise_in_frequency() -> None:
    bands = mel_bands()
    assert bands.shape == (NUM_BANDS, 257)
    assert torch.allclose(bands.sum(1), torch.ones(NUM_BANDS))
    centres = (bands * torch.arange(257.0)).sum(1)
    assert (centres.diff() > 0).all()


def test_a_wav_gives_back_the_samples_that_were_written(tmp_path: Path) -> None:
    samples = torch.arange(-32768, 32768, 7).to(torch.int16)
    write_wav(tmp_path / "a.wav", from_pcm(samples), 22050)
    wave, sample_rate = read_wav(tmp_path / "a.wav")
    assert (sample_rate, wave.dtype) == (22050, torch.float32)
    assert torch.equal(to_pcm(wave), samples)
    with wave_format.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getnframes()) == (1, 2, len(samples))


def test_samples_beyond_full_scale_are_clipped_and_never_wrap(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", torch.tensor([1.0, 1.5, -1.0, -1.5, math.inf, -math.inf, math.nan, 0.25]))
    assert to_pcm(read_wav(tmp_path / "a.wav")[0]).tolist() == [*(32767, 32767, -32768, -32768, 32767, -32768, 0, 8192)]


def test_wavs_of_several_channels_are_averaged_and_of_other_widths_refused(tmp_path: Path) -> None:
    for channels, width in ((2, 2), (1, 1)):
        with wave_format.open(str(tmp_path / f"{width}.wav"), "wb") as file:
            file.setparams((channels, width, 8000, 0, "NONE", ""))
            file.writeframes(torch.tensor([100, 300, -200, 0], dtype=torch.int16).numpy().tobytes())
    stereo = (tmp_path / "2.wav").read_bytes()
    assert to_pcm(read_wav(io.BytesIO(stereo))[0]).tolist() == [200, -100]
    with pytest.raises(ValueError, match="expected 16-bit samples, found 8-bit"):
        read_wav(tmp_path / "1.wav")


def test_an_empty_wav_is_empty(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", torch.zeros(0))
    assert read_wav(tmp_path / "a.wav")[0].shape == (0,)
    with pytest.raises(ValueError, match=r"audio: expected \[samples\], found \[1, 5\]"):
        write_wav(tmp_path / "a.wav", torch.zeros(1, 5))
