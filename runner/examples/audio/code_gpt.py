"""Owns a small GPT over several streams of audio codes, and a report that lets it be heard; imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.examples.byte_gpt import Block, rotary_table
from runner.tracking.media import Audio
from runner.utils.pattern import PatternProvider


class CodeGPT(nn.Module):
    """A decoder-only transformer over codes of K codebooks, laid out by a pattern: a step sees those before it.

    A step's input is the sum of one embedding a codebook; each codebook has a head of its own. Both are one module for
    all codebooks, so that the blocks are the only list of modules.

    Args:
        pattern: how the codebooks are interleaved.
        card: entries of a codebook.
        width: size of the residual stream; a multiple of 2 x heads.
        depth: number of blocks.
        heads: of attention.
        dropout: share of the input and of each branch that training drops, 0 to 1.

    Raises:
        ValueError: `width` does not split into `heads` of even size, or there is no pattern.
    """

    first: Tensor

    def __init__(
        self,
        pattern: PatternProvider,
        card: int = 512,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"CodeGPT: width is a multiple of 2 * heads, here {2 * heads}, not {width}")
        if not isinstance(pattern, PatternProvider):
            raise ValueError(f"CodeGPT: pattern is {pattern!r}; choose one, as in pattern=delayed")
        self.pattern, self.card, self.heads = pattern, card, heads
        num_codebooks = pattern.num_codebooks
        self.embedding = nn.Embedding(num_codebooks * (card + 1), width)  # the last one of each stands for no code
        self.register_buffer("first", torch.arange(num_codebooks)[:, None] * (card + 1), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, num_codebooks * card, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1 * num_codebooks**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)  # an untrained model is close to uniform

    def forward(self, codes: Tensor, lengths: Sequence[int]) -> dict[str, Tensor | int]:
        """The loss of predicting each code from what its pattern lays before it.

        A piece is laid out by its own length, and what fills up the batch comes after it: its loss is the one it has
        alone.

        Args:
            codes: int64 [batch, codebooks, frames], the shorter ones filled up with anything.
            lengths: frames of each.
        Returns:
            `loss` in nats a code, the mean over codebooks and pieces; `loss_1` to `loss_K`, that of each codebook;
            `tokens`, the number of codes; `weight`, the number of pieces, since each counts alike.
        Raises:
            ValueError: the codes are of another number of codebooks, or the lengths not one for each piece.
        """
        num_codebooks, expected = codes.shape[1], self.pattern.num_codebooks
        if num_codebooks != expected:
            raise ValueError(f"CodeGPT: its pattern is of {expected} codebooks, the codes of {num_codebooks}")
        if len(lengths) != len(codes) or not all(0 < length <= codes.shape[2] for length in lengths):
            given = f"lengths {list(lengths)} for codes {list(codes.shape)}"
            raise ValueError(f"CodeGPT: expected a length from 1 to {codes.shape[2]} for each piece, found {given}")
        codes = codes.long()
        rows_of = {length: [row for row, other in enumerate(lengths) if other == length] for length in lengths}
        groups = [(self.pattern(length), rows) for length, rows in rows_of.items()]
        most = max(pattern.num_steps for pattern, _ in groups)
        sequence = codes.new_full((len(codes), num_codebooks, most), self.card)
        for pattern, rows in groups:
            sequence[rows, :, : pattern.num_steps], _ = pattern.build(codes[rows, :, : pattern.timesteps], self.card)
        logits = self.logits(sequence[..., :-1])
        found = []
        for pattern, rows in groups:
            scores, _ = pattern.revert_logits(logits[rows][..., : pattern.num_steps - 1])
            targets = codes[rows, :, : pattern.timesteps]
            found.append(F.cross_entropy(scores, targets, reduction="none").mean(2))
        each = torch.cat(found).mean(0)
        own = {f"loss_{number}": loss.detach() for number, loss in enumerate(each, 1)}
        return {"loss": each.mean(), **own, "tokens": num_codebooks * sum(lengths), "weight": len(codes)}

    def logits(self, sequence: Tensor) -> Tensor:
        """Scores of the codes of the step after each: int64 [batch, K, steps] to float32 [batch, card, K, steps]."""
        num_codebooks, steps = sequence.shape[1:]
        stream = self.dropout(self.embedding(sequence + self.first).sum(1))
        cosine, sine = (each.to(stream.device) for each in rotary_table(steps, stream.shape[-1] // self.heads))
        for block in self.blocks:
            stream = block(stream, cosine, sine)
        scores = self.head(self.norm(stream)).float()
        return scores.unflatten(-1, (num_codebooks, self.card)).permute(0, 3, 2, 1)

    @torch.no_grad()
    def generate(self, prompt: Tensor, timesteps: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """The codes [codebooks, timesteps] that begin with `prompt` [codebooks, frames]; call it in eval mode.

        The same seed gives the same codes; torch's global generators are neither read nor moved. Temperature 0 takes
        the likeliest.
        """
        generator = torch.Generator().manual_seed(seed)
        pattern = self.pattern(timesteps)
        sequence, missing = pattern.build_prefix(prompt[None], self.card, self.card)
        for step in range(pattern.first_step(prompt.shape[1]), pattern.num_steps):
            scores = self.logits(sequence[..., :step])[
                0, :, :, -1
            ].T.cpu()  # drawn there: a seed means the same anywhere
            if temperature > 0:
                drawn = torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)[:, 0]
            else:
                drawn = scores.argmax(1)
            sequence[0, :, step] = torch.where(missing[:, step], drawn.to(sequence.device), sequence[0, :, step])
        return pattern.revert(sequence, self.card)[0][0]


class Continuation:
    """A report with three sounds: a piece of speech, its round trip through the codec, and how the model goes on.

    The prompt is the beginning of the piece; what follows is the model's own. The same seed at each evaluation, so that
    they compare.

    Args:
        index: which of the pieces long enough; they are counted from the shortest.
        prompt_s: seconds of speech that the model is given.
        continued_s: seconds that it adds.
        temperature: 0 takes the likeliest code; 1 draws from the model's own distribution.
        seed: of the sampling.
    """

    def __init__(
        self,
        index: int = 0,
        prompt_s: float = 1.0,
        continued_s: float = 1.5,
        temperature: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.index, self.prompt_s, self.continued_s = index, prompt_s, continued_s
        self.temperature, self.seed = temperature, seed

    def __call__(self, module: CodeGPT, dataset: object) -> dict[str, Audio]:
        """`original`, `round_trip` and `continuation`; the dataset has `codes`, `wave(index)` and `codec`.

        Raises:
            ValueError: the dataset has no piece that is long enough.
        """
        codec, lengths = dataset.codec, dataset.lengths  # type: ignore[attr-defined]
        num_frames, num_added = (max(1, round(s * codec.frame_rate)) for s in (self.prompt_s, self.continued_s))
        fitting = [index for index, length in enumerate(lengths.tolist()) if length >= num_frames + num_added]
        if not fitting:
            longest = max(lengths.tolist()) / codec.frame_rate
            asked = self.prompt_s + self.continued_s
            raise ValueError(
                f"Continuation: no piece is {asked:g} s long, the longest {longest:.2f}; set prompt_s lower"
            )
        index = fitting[self.index % len(fitting)]
        codes = dataset[index]["codes"]  # type: ignore[index]
        device = module.head.weight.device
        own = module.generate(codes[:, :num_frames].to(device), num_frames + num_added, self.temperature, self.seed)
        rate = int(codec.sample_rate)
        return {
            "original": Audio(dataset.wave(index), rate),  # type: ignore[attr-defined]
            "round_trip": Audio(_decode(codec, codes), rate),
            "continuation": Audio(_decode(codec, own.cpu()), rate),
        }


def _decode(codec: Any, codes: Tensor) -> Tensor:
    wave: Tensor = codec.decode(codes[None])
    if wave.ndim != 2 or len(wave) != 1:
        found = f"{type(codec).__name__}.decode gave {list(wave.shape)} for codes {[1, *codes.shape]}"
        raise ValueError(f"Continuation: {found}; expected [1, samples]")
    return wave[0]
