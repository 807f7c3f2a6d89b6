"""A codec for speech that needs no download, and reading and writing of WAV files.

Any object with `encode`, `decode`, `num_codebooks`, `card`, `sample_rate` and `frame_rate` can replace the codec.
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

SAMPLE_RATE = 16000  # samples a second
HOP = 160  # samples
WINDOW = 512  # samples
NUM_BANDS = 80
# Two spectra a frame of 20 ms: 50 frames a second, and the 10 ms resolution that a plosive needs.
SPECTRA_PER_FRAME = 2
FRAME = SPECTRA_PER_FRAME * HOP  # samples
# Added to each band before the logarithm, 80 dB below a full-scale sine, so that no entries are used for silence.
FLOOR = 0.01
# Magnitude of a full-scale sine. Decoded spectra are clamped to it, because codes of a model can add up to more.
MAX_MAGNITUDE = WINDOW / 4
FULL_SCALE = 32768


class MelCodec(nn.Module):
    """A residual vector quantizer of log-mel spectra at 16 kHz, 50 frames a second, fitted by k-means.

    Each frame is two spectra of 80 bands. The first codebook quantizes them, and each later codebook quantizes the
    residual of those before it. The codes contain no phase: `decode` estimates one. Decoded audio therefore sounds like
    the original but has other samples, and its signal-to-noise ratio is meaningless.

    Args:
        num_codebooks: codes per frame.
        card: entries of a codebook.
        num_steps: k-means steps per codebook.
        vectors_per_entry: maximum number of training frames per entry on which a codebook is fitted.
        num_phase_steps: steps of the phase estimation; more than 32 hardly improve it.
        seed: seed for the frames that are drawn.

    Raises:
        ValueError: an argument is below 1, or `card` is 1.
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
        """The settings that determine the codes: equal keys and equal audio to fit give equal codes."""
        settings = (self.num_codebooks, self.card, self.num_steps, self.vectors_per_entry, self.seed)
        return f"MelCodec 1: {settings}"

    @torch.no_grad()
    def fit(self, waves: Sequence[Tensor]) -> MelCodec:
        """Fits each codebook to the residual of those before it, and returns the codec.

        The same audio gives the same codebooks. torch's global generators are not used.

        Args:
            waves: float [samples] each.

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
        residual = vectors - self.mean
        for codebook in self.codebooks:
            drawn = torch.randperm(len(residual), generator=generator)[: self.vectors_per_entry * self.card]
            codebook.copy_(fit_entries(residual[drawn.to(residual.device)], self.card, self.num_steps))
            residual = residual - codebook[nearest(residual, codebook)[0]]
        return self

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Encodes audio: float [samples] or [batch, samples] to int64 [codebooks, frames] or [batch, ...].

        The last frame is padded with silence.

        Raises:
            ValueError: `wave` has another shape or no samples, or the codec was not fitted.
        """
        if wave.ndim not in (1, 2) or not wave.shape[-1]:
            raise ValueError(f"MelCodec: audio is [samples] or [batch, samples], found {list(wave.shape)}")
        if not self.codebooks.any():
            raise ValueError("MelCodec: fit(waves) or load_state_dict comes before encode")
        vectors = self.vectors(wave if wave.ndim == 2 else wave[None])
        residual = (vectors - self.mean).flatten(0, 1)
        codes = []
        for codebook in self.codebooks:
            codes.append(nearest(residual, codebook)[0])
            residual = residual - codebook[codes[-1]]
        stacked = torch.stack(codes).view(-1, *vectors.shape[:2]).transpose(0, 1)
        return stacked.contiguous() if wave.ndim == 2 else stacked[0].contiguous()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes: int [codebooks, frames] or [batch, ...] to float32 [320 * frames] or [batch, ...].

        The first codebooks can be decoded alone: `decode(codes[:, :2])`.

        Raises:
            ValueError: `codes` has another shape, or more codebooks than the codec.
        """
        if codes.ndim not in (2, 3) or not 1 <= codes.shape[-2] <= self.num_codebooks:
            raise ValueError(
                f"MelCodec: codes are [codebooks, frames] or [batch, codebooks, frames] with 1 to "
                f"{self.num_codebooks} codebooks, found {list(codes.shape)}"
            )
        batched = codes if codes.ndim == 3 else codes[None]
        wave = self.reconstruct(self.dequantize(batched))
        return wave if codes.ndim == 3 else wave[0]

    def vectors(self, wave: Tensor) -> Tensor:
        """Returns the vectors to quantize: [batch, samples] to log-mel spectra, float32 [batch, frames, 160]."""
        wave = F.pad(wave.to(self.mean), (0, -wave.shape[-1] % FRAME))
        # The last spectrum is dropped: it is centred on the end of the last frame and belongs to the next one.
        mel = self.bands @ self.spectra(wave).abs()[..., :-1]
        return (mel + FLOOR).log().transpose(1, 2).reshape(len(wave), -1, self.mean.numel())

    def dequantize(self, codes: Tensor) -> Tensor:
        """Dequantizes codes: int [batch, codebooks, frames] to `vectors`, float32 [batch, frames, 160]."""
        entries = [codebook[indices] for codebook, indices in zip(self.codebooks, codes.unbind(1), strict=False)]
        return torch.stack(entries).sum(0) + self.mean

    def spectra(self, wave: Tensor) -> Tensor:
        """Returns the short-time Fourier transform: [batch, samples] to complex [batch, 257, samples / 160 + 1]."""
        return torch.stft(wave, WINDOW, HOP, window=self.window, return_complex=True)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Reconstructs audio from `vectors` [batch, frames, 160], the same each time: [batch, 320 * frames].

        Source: Perraudin et al., A fast Griffin-Lim algorithm, WASPAA 2013.
        """
        batch, num_frames = vectors.shape[:2]
        if not num_frames:
            return vectors.new_zeros(batch, 0)
        mel = vectors.reshape(batch, -1, NUM_BANDS).transpose(1, 2).clamp(max=math.log(MAX_MAGNITUDE)).exp()
        mel = (mel - FLOOR).clamp(min=0)
        magnitude = self.find_magnitude(torch.cat((mel, mel[..., -1:]), dim=-1))
        # The whole batch starts from the same phase, so that a sample's audio does not depend on the others.
        generator = torch.Generator().manual_seed(self.seed)
        angles = torch.rand(magnitude.shape[1:], generator=generator).to(magnitude.device)
        phase = torch.polar(torch.ones_like(angles), 2 * math.pi * angles).expand_as(magnitude)
        previous = torch.zeros_like(phase)
        for step in range(self.num_phase_steps + 1):
            wave = torch.istft(magnitude * phase, WINDOW, HOP, window=self.window, length=FRAME * num_frames)
            if step < self.num_phase_steps:
                spectra = self.spectra(wave)
                accelerated = spectra + 0.99 * (spectra - previous) if step else spectra
                previous, phase = spectra, accelerated / accelerated.abs().clamp(min=1e-9)
        return wave

    def find_magnitude(self, mel: Tensor) -> Tensor:
        """Inverts the mel bands approximately: [batch, 80, spectra] to magnitudes >= 0, [batch, 257, spectra].

        Source: Lee & Seung, Algorithms for non-negative matrix factorization, NIPS 2000 (its update for one factor).
        """
        magnitude = (self.inverse @ mel).clamp(min=1e-5)
        target = self.bands.T @ mel
        for _ in range(20):
            magnitude = magnitude * target / (self.bands.T @ (self.bands @ magnitude)).clamp(min=1e-8)
        return magnitude


def fit_entries(vectors: Tensor, card: int, num_steps: int) -> Tensor:
    """Fits entries [card, size] by k-means to `vectors` [num, size], with `num` at least `card`.

    The first vectors are the initial entries. An entry that is nearest to no vector moves to the vector that is
    farthest from its entry.
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
    """Returns the index of the entry nearest to each of `vectors` [num, size], and its squared distance.

    The shapes are int64 [num] and float32 [num].
    """
    norms = entries.square().sum(1)
    # In blocks, so that the scores [4096, card] fit into the processor's caches.
    minima = [torch.addmm(norms, block, entries.T, alpha=-2).min(1) for block in vectors.split(4096)]
    distances = torch.cat([minimum.values for minimum in minima]) + vectors.square().sum(1)
    return torch.cat([minimum.indices for minimum in minima]), distances


def mel_bands() -> Tensor:
    """Returns the weights of 80 triangular bands, evenly spaced in mel, each with the sum 1: float32 [80, 257]."""
    max_mel = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, max_mel, NUM_BANDS + 2, dtype=torch.float64) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    weights = torch.minimum(rising, falling).clamp(min=0)
    # The lowest bands can be narrower than the spacing of the frequencies; they get the nearest frequency.
    rows = torch.arange(NUM_BANDS)
    nearest_frequency = (frequencies - centre).abs().argmin(1)
    is_empty = weights.sum(1) < 0.1
    weights[rows[is_empty], nearest_frequency[is_empty]] = 1
    return (weights / weights.sum(1, keepdim=True)).float()


def write_wav(path: str | os.PathLike[str], wave: Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes `wave`, float [samples], to a WAV file of 16-bit PCM, clipped to -1 and 1.

    Raises:
        ValueError: `wave` has another shape.
    """
    Path(path).write_bytes(Audio(wave, sample_rate).encode())


def read_wav(path: str | os.PathLike[str] | BinaryIO) -> tuple[Tensor, int]:
    """Reads a WAV file of 16-bit PCM: float32 [samples] from -1 to 1, channels averaged, and the sample rate.

    Raises:
        ValueError: the samples do not have 16 bits.
        wave.Error: the file is not a WAV file of PCM.
    """
    with wave_format.open(os.fspath(path) if isinstance(path, str | os.PathLike) else path, "rb") as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"read_wav: expected 16-bit samples, found {8 * file.getsampwidth()}-bit: {path}")
        frames = bytearray(file.readframes(file.getnframes()))
        channels, sample_rate = file.getnchannels(), file.getframerate()
    samples = torch.frombuffer(frames, dtype=torch.int16) if frames else torch.zeros(0, dtype=torch.int16)
    return from_pcm(samples).view(-1, channels).mean(1), sample_rate


def to_pcm(wave: Tensor) -> Tensor:
    """Converts `wave`, float [samples], to int16: clipped to -1 and 1, and NaN becomes 0."""
    if wave.ndim != 1:
        raise ValueError(f"audio is [samples], found {list(wave.shape)}")
    scaled = (wave.detach().cpu().float().nan_to_num(0.0) * FULL_SCALE).round()
    return scaled.clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)


def from_pcm(samples: Tensor) -> Tensor:
    """Converts int16 [samples] to float32 from -1 to 1; `to_pcm` returns the same integers."""
    return samples.float() / FULL_SCALE
