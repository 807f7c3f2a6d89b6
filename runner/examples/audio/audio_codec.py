"""Owns a codec for speech that needs no download, and WAV files; imports torch and the runner's own `Audio`.

Any object with `encode`, `decode`, `num_codebooks`, `card`, `sample_rate` and `frame_rate` can take its place.
"""

from __future__ import annotations

import math
import os
import wave as wave_format
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.tracking.media import Audio

SAMPLE_RATE = 16000
HOP = 160
WINDOW = 512
NUM_BANDS = 80
# Two spectra a code frame: 20 ms are 50 frames a second, and 10 ms are what a plosive needs.
SPECTRA_PER_FRAME = 2
FRAME = SPECTRA_PER_FRAME * HOP
# Added to each band before the logarithm, 80 dB under a full-scale sine: entries are not spent on kinds of silence.
FLOOR = 0.01
# What a full-scale sine has: a model's codes can add up to more than any that were heard.
LOUDEST = WINDOW / 4
FULL_SCALE = 32768


class MelCodec(nn.Module):
    """A residual vector quantizer of log-mel spectra at 16 kHz, 50 frames a second, fitted by k-means.

    Each frame is two spectra of 80 bands. The first codebook says what is nearest to them, each later one what is
    nearest to what is left. There is no phase in the codes: `decode` finds one that fits, so what it returns sounds
    like the original, but its samples are others, and a signal-to-noise ratio says nothing about it.

    Args:
        num_codebooks: codes a frame.
        card: entries of a codebook.
        num_steps: k-means steps a codebook.
        vectors_per_entry: training frames a codebook is fitted on, at most, for each of its entries.
        num_phase_steps: steps of the search for a phase; 32 is near what can be reached.
        seed: of the frames that are drawn.

    Raises:
        ValueError: a setting is below 1, or `card` is 1.
    """

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / FRAME
    codebooks: Tensor
    mean: Tensor
    window: Tensor
    bands: Tensor
    inverse: Tensor

    def __init__(
        self,
        num_codebooks: int = 4,
        card: int = 512,
        num_steps: int = 8,
        vectors_per_entry: int = 20,
        num_phase_steps: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(num_codebooks, card - 1, num_steps, vectors_per_entry, num_phase_steps) < 1:
            raise ValueError(
                "MelCodec: num_codebooks, num_steps, vectors_per_entry and num_phase_steps are at least 1 and card at "
                f"least 2, not {num_codebooks}, {num_steps}, {vectors_per_entry}, {num_phase_steps} and {card}"
            )
        self.num_codebooks = num_codebooks
        self.card = card
        self.num_steps = num_steps
        self.vectors_per_entry = vectors_per_entry
        self.num_phase_steps = num_phase_steps
        self.seed = seed
        self.register_buffer("codebooks", torch.zeros(num_codebooks, card, SPECTRA_PER_FRAME * NUM_BANDS))
        self.register_buffer("mean", torch.zeros(SPECTRA_PER_FRAME * NUM_BANDS))
        bands = mel_bands()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(bands.double()).float(), persistent=False)

    @property
    def key(self) -> str:
        """All that, beside the audio it is fitted on, decides the codes: equal keys, equal codes."""
        fitted = (self.num_codebooks, self.card, self.num_steps, self.vectors_per_entry, self.seed)
        return f"MelCodec 1: {fitted}"

    @torch.no_grad()
    def fit(self, waves: Sequence[Tensor]) -> MelCodec:
        """Fits each codebook to what those before it leave of `waves`, float [samples] each, and returns itself.

        The same audio gives the same codebooks; torch's global generators are neither read nor moved.

        Raises:
            ValueError: there are fewer frames than entries in a codebook.
        """
        vectors = torch.cat([self.vectors(wave[None])[0] for wave in waves]) if waves else self.mean.expand(0, -1)
        if len(vectors) < self.card:
            raise ValueError(
                f"MelCodec: {self.card} entries need as many frames, found {len(vectors)}, "
                f"{len(vectors) / self.frame_rate:.1f} s of audio; give it more audio, or a smaller card"
            )
        generator = torch.Generator().manual_seed(self.seed)
        self.mean.copy_(vectors.mean(0))
        left = vectors - self.mean
        for codebook in self.codebooks:
            drawn = torch.randperm(len(left), generator=generator)[: self.vectors_per_entry * self.card]
            codebook.copy_(fit_entries(left[drawn.to(left.device)], self.card, self.num_steps))
            left = left - codebook[nearest(left, codebook)[0]]
        return self

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes of audio: float [samples] or [batch, samples] to int64 [codebooks, frames] or [batch, ...].

        The last frame is filled up with silence.

        Raises:
            ValueError: `wave` has other axes or no sample, or the codec was not fitted.
        """
        if wave.ndim not in (1, 2) or not wave.shape[-1]:
            raise ValueError(f"MelCodec: audio is [samples] or [batch, samples], found {list(wave.shape)}")
        if not self.codebooks.any():
            raise ValueError("MelCodec: fit(waves) or load_state_dict comes before encode")
        vectors = self.vectors(wave if wave.ndim == 2 else wave[None])
        left = (vectors - self.mean).flatten(0, 1)
        codes = []
        for codebook in self.codebooks:
            codes.append(nearest(left, codebook)[0])
            left = left - codebook[codes[-1]]
        stacked = torch.stack(codes).view(-1, *vectors.shape[:2]).transpose(0, 1)
        return stacked.contiguous() if wave.ndim == 2 else stacked[0].contiguous()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Audio of codes: int [codebooks, frames] or [batch, ...] to float32 [320 * frames] or [batch, ...].

        The first few codebooks alone can be decoded, too: `decode(codes[:, :2])`.

        Raises:
            ValueError: `codes` has other axes, or more codebooks than the codec.
        """
        if codes.ndim not in (2, 3) or not 1 <= codes.shape[-2] <= self.num_codebooks:
            raise ValueError(
                f"MelCodec: codes are [codebooks, frames] or [batch, codebooks, frames] with 1 to "
                f"{self.num_codebooks} codebooks, found {list(codes.shape)}"
            )
        batched = codes if codes.ndim == 3 else codes[None]
        wave = self.find_wave(self.look_up(batched))
        return wave if codes.ndim == 3 else wave[0]

    def vectors(self, wave: Tensor) -> Tensor:
        """What is quantized: [batch, samples] to log-mel spectra, float32 [batch, frames, 160]."""
        wave = F.pad(wave.to(self.mean), (0, -wave.shape[-1] % FRAME))
        # The last spectrum is centred on the end of the last frame: it would belong to the next.
        loudness = self.bands @ self.spectra(wave).abs()[..., :-1]
        return (loudness + FLOOR).log().transpose(1, 2).reshape(len(wave), -1, self.mean.numel())

    def look_up(self, codes: Tensor) -> Tensor:
        """What codes stand for: int [batch, codebooks, frames] to `vectors`, float32 [batch, frames, 160]."""
        found = [book[each] for book, each in zip(self.codebooks, codes.unbind(1), strict=False)]
        return torch.stack(found).sum(0) + self.mean

    def spectra(self, wave: Tensor) -> Tensor:
        """Short-time Fourier transform: [batch, samples] to complex [batch, 257, samples / 160 + 1]."""
        return torch.stft(wave, WINDOW, HOP, window=self.window, return_complex=True)

    def find_wave(self, vectors: Tensor) -> Tensor:
        """A wave with the spectra `vectors` [batch, frames, 160]: [batch, 320 * frames], the same each time.

        Source: Perraudin et al., A fast Griffin-Lim algorithm, WASPAA 2013.
        """
        batch, num_frames = vectors.shape[:2]
        if not num_frames:
            return vectors.new_zeros(batch, 0)
        loudness = vectors.reshape(batch, -1, NUM_BANDS).transpose(1, 2).clamp(max=math.log(LOUDEST)).exp()
        loudness = (loudness - FLOOR).clamp(min=0)
        size = self.find_size(torch.cat((loudness, loudness[..., -1:]), dim=-1))
        # One phase for the whole batch: an utterance sounds the same alone and among others as long.
        angles = torch.rand(size.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(size.device)
        phase = torch.polar(torch.ones_like(angles), 2 * math.pi * angles).expand_as(size)
        before = torch.zeros_like(phase)
        for step in range(self.num_phase_steps + 1):
            wave = torch.istft(size * phase, WINDOW, HOP, window=self.window, length=FRAME * num_frames)
            if step < self.num_phase_steps:
                reached = self.spectra(wave)
                ahead = reached + 0.99 * (reached - before) if step else reached
                before, phase = reached, ahead / ahead.abs().clamp(min=1e-9)
        return wave

    def find_size(self, loudness: Tensor) -> Tensor:
        """Magnitudes >= 0 whose bands are `loudness` [batch, 80, spectra], as nearly as can be: [batch, 257, spectra].

        Source: Lee & Seung, Algorithms for non-negative matrix factorization, NIPS 2000 (its update for one factor).
        """
        size = (self.inverse @ loudness).clamp(min=1e-5)
        wanted = self.bands.T @ loudness
        for _ in range(20):
            size = size * wanted / (self.bands.T @ (self.bands @ size)).clamp(min=1e-8)
        return size


def fit_entries(vectors: Tensor, card: int, num_steps: int) -> Tensor:
    """Entries [card, size] by k-means on `vectors` [num, size], at least `card`, the first of which are the start.

    An entry that nothing is nearest to moves to a vector that is farthest from its own.
    """
    entries = vectors[:card].clone()
    for _ in range(num_steps):
        codes, distances = nearest(vectors, entries)
        counts = torch.bincount(codes, minlength=card)
        entries = torch.zeros_like(entries).index_add_(0, codes, vectors) / counts.clamp(min=1)[:, None]
        is_empty = counts == 0
        entries[is_empty] = vectors[distances.argsort(descending=True, stable=True)[: int(is_empty.sum())]]
    return entries


def nearest(vectors: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The entry nearest to each of `vectors` [num, size], int64 [num], and its squared distance, float32 [num]."""
    norms = entries.square().sum(1)
    # A block at a time: all scores at once, [num, card], would leave the processor's caches.
    found = [torch.addmm(norms, block, entries.T, alpha=-2).min(1) for block in vectors.split(4096)]
    distances = torch.cat([least.values for least in found]) + vectors.square().sum(1)
    return torch.cat([least.indices for least in found]), distances


def mel_bands() -> Tensor:
    """Weights of 80 triangular bands, evenly spaced on the mel scale, each with the sum 1: float32 [80, 257]."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, NUM_BANDS + 2, dtype=torch.float64) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    weights = torch.minimum(rising, falling).clamp(min=0)
    # The lowest bands are narrower than the spacing of the frequencies: such a one takes the nearest of them.
    rows = torch.arange(NUM_BANDS)
    nearest_frequency = (frequencies - centre).abs().argmin(1)
    is_missed = weights.sum(1) < 0.1
    weights[rows[is_missed], nearest_frequency[is_missed]] = 1
    return (weights / weights.sum(1, keepdim=True)).float()


def write_wav(path: str | os.PathLike[str], wave: Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """`path` is a WAV file of `wave`, float [samples], as 16-bit PCM; what is beyond -1 and 1 is clipped.

    Raises:
        ValueError: `wave` has other axes.
    """
    Path(path).write_bytes(Audio(wave, sample_rate).encode())


def read_wav(path: str | os.PathLike[str] | BinaryIO) -> tuple[Tensor, int]:
    """Audio of a WAV file of 16-bit PCM, channels averaged: float32 [samples] from -1 to 1, and its sample rate.

    Raises:
        ValueError: its samples have another width.
        wave.Error: it is not a WAV file of PCM.
    """
    with wave_format.open(os.fspath(path) if isinstance(path, str | os.PathLike) else path, "rb") as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"read_wav: expected 16-bit samples, found {8 * file.getsampwidth()}-bit: {path}")
        frames = bytearray(file.readframes(file.getnframes()))
        channels, sample_rate = file.getnchannels(), file.getframerate()
    samples = torch.frombuffer(frames, dtype=torch.int16) if frames else torch.zeros(0, dtype=torch.int16)
    return from_pcm(samples).view(-1, channels).mean(1), sample_rate


def to_pcm(wave: Tensor) -> Tensor:
    """`wave`, float [samples], as int16; what is beyond -1 and 1 is clipped, what is no number is silence."""
    if wave.ndim != 1:
        raise ValueError(f"audio is [samples], found {list(wave.shape)}")
    scaled = (wave.detach().cpu().float().nan_to_num(0.0) * FULL_SCALE).round()
    return scaled.clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)


def from_pcm(samples: Tensor) -> Tensor:
    """int16 [samples] as float32 from -1 to 1; `to_pcm` gives back the same integers."""
    return samples.float() / FULL_SCALE
