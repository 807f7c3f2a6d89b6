"""A small GPT over several streams of audio codes, and a report with audio that it generates."""

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
    """A decoder-only transformer over the codes of K codebooks, interleaved by a pattern.

    A step's input is the sum of one embedding per codebook, and each codebook has its own head. All embeddings are one
    module, and so are all heads, so that the blocks are the only list of modules.

    Args:
        pattern: the interleaving of the codebooks.
        card: entries of a codebook.
        width: size of the residual stream; a multiple of 2 * `heads`.
        depth: number of blocks.
        heads: attention heads.
        dropout: dropout probability of the input and of each branch, 0 to 1.

    Raises:
        ValueError: `width` is not a multiple of 2 * `heads`, or `pattern` is not a PatternProvider.
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
        self.pattern = pattern
        self.card = card
        self.heads = heads
        num_codebooks = pattern.num_codebooks
        self.embedding = nn.Embedding(num_codebooks * (card + 1), width)  # one more per codebook: no code
        self.register_buffer("first", torch.arange(num_codebooks)[:, None] * (card + 1), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, num_codebooks * card, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1 * num_codebooks**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)  # an untrained model predicts nearly uniformly

    def forward(self, codes: Tensor, lengths: Sequence[int]) -> dict[str, Tensor | int]:
        """Returns the loss of predicting each code from the steps before it in the pattern.

        Each piece is interleaved by its own length, with the padding after it, so its loss does not depend on the
        other pieces of the batch.

        Args:
            codes: int64 [batch, codebooks, frames], shorter pieces padded with any value.
            lengths: number of frames of each piece.
        Returns:
            `loss` in nats per code, the mean over codebooks and pieces; `loss_1` to `loss_K`, the loss of each
            codebook; `tokens`, the number of codes; `weight`, the number of pieces, which are weighted equally.
        Raises:
            ValueError: the number of codebooks differs from the pattern's, or there isn't one length per piece.
        """
        num_codebooks, expected = codes.shape[1], self.pattern.num_codebooks
        if num_codebooks != expected:
            raise ValueError(f"CodeGPT: its pattern is of {expected} codebooks, the codes of {num_codebooks}")
        if len(lengths) != len(codes) or not all(0 < length <= codes.shape[2] for length in lengths):
            found = f"lengths {list(lengths)} for codes {list(codes.shape)}"
            raise ValueError(f"CodeGPT: expected a length from 1 to {codes.shape[2]} for each piece, found {found}")
        codes = codes.long()
        rows_of: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            rows_of.setdefault(length, []).append(row)
        groups = [(self.pattern(length), rows) for length, rows in rows_of.items()]
        max_steps = max(pattern.num_steps for pattern, _ in groups)
        sequence = codes.new_full((len(codes), num_codebooks, max_steps), self.card)
        for pattern, rows in groups:
            sequence[rows, :, : pattern.num_steps], _ = pattern.build(codes[rows, :, : pattern.timesteps], self.card)
        logits = self.logits(sequence[..., :-1])
        losses = []
        for pattern, rows in groups:
            predicted, _ = pattern.revert_logits(logits[rows][..., : pattern.num_steps - 1])
            targets = codes[rows, :, : pattern.timesteps]
            losses.append(F.cross_entropy(predicted, targets, reduction="none").mean(2))
        codebook_losses = torch.cat(losses).mean(0)
        named = {f"loss_{number}": loss.detach() for number, loss in enumerate(codebook_losses, 1)}
        return {"loss": codebook_losses.mean(), **named, "tokens": num_codebooks * sum(lengths), "weight": len(codes)}

    def logits(self, sequence: Tensor) -> Tensor:
        """Returns the logits of each step's next step: int64 [batch, K, steps] to float32 [batch, card, K, steps]."""
        num_codebooks, steps = sequence.shape[1:]
        stream = self.dropout(self.embedding(sequence + self.first).sum(1))
        cosine, sine = (table.to(stream.device) for table in rotary_table(steps, stream.shape[-1] // self.heads))
        for block in self.blocks:
            stream = block(stream, cosine, sine)
        logits = self.head(self.norm(stream)).float()
        return logits.unflatten(-1, (num_codebooks, self.card)).permute(0, 3, 2, 1)

    @torch.no_grad()
    def generate(self, prompt: Tensor, timesteps: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Generates codes [codebooks, timesteps] that begin with `prompt` [codebooks, frames]. Expects eval mode.

        The same seed gives the same codes. torch's global generators are not used. Temperature 0 takes the most likely
        code.
        """
        generator = torch.Generator().manual_seed(seed)
        pattern = self.pattern(timesteps)
        sequence, missing = pattern.build_prefix(prompt[None], self.card, self.card)
        for step in range(pattern.first_step(prompt.shape[1]), pattern.num_steps):
            # Sampled on the CPU, so that a seed gives the same codes on every device.
            logits = self.logits(sequence[..., :step])[0, :, :, -1].T.cpu()
            if temperature > 0:
                sampled = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
            else:
                sampled = logits.argmax(1)
            sequence[0, :, step] = torch.where(missing[:, step], sampled.to(sequence.device), sequence[0, :, step])
        return pattern.revert(sequence, self.card)[0][0]


class Continuation:
    """A report with three sounds: a piece of speech, the same decoded from its codes, and the model's continuation.

    The prompt is the beginning of the piece. The seed is the same at each evaluation, so that results are comparable.

    Args:
        index: index of the piece, among those that are long enough, from the shortest.
        prompt_s: seconds of speech in the prompt.
        continued_s: seconds that the model generates.
        temperature: 0 takes the most likely code; 1 samples from the model's distribution.
        seed: seed of the sampling.
    """

    def __init__(
        self,
        index: int = 0,
        prompt_s: float = 1.0,
        continued_s: float = 1.5,
        temperature: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.index = index
        self.prompt_s = prompt_s
        self.continued_s = continued_s
        self.temperature = temperature
        self.seed = seed

    def __call__(self, module: CodeGPT, dataset: object) -> dict[str, Audio]:
        """Returns `original`, `round_trip` and `continuation`; the dataset has `codec`, `lengths` and `wave(index)`.

        Raises:
            ValueError: the dataset has no piece that is long enough.
        """
        codec, lengths = dataset.codec, dataset.lengths.tolist()  # type: ignore[attr-defined]
        prompt_length = max(1, round(self.prompt_s * codec.frame_rate))
        total_length = prompt_length + max(1, round(self.continued_s * codec.frame_rate))
        long_enough = [index for index, length in enumerate(lengths) if length >= total_length]
        if not long_enough:
            longest_s = max(lengths) / codec.frame_rate
            total_s = self.prompt_s + self.continued_s
            raise ValueError(
                f"Continuation: no piece is {total_s:g} s long, the longest {longest_s:.2f}; set prompt_s lower"
            )
        index = long_enough[self.index % len(long_enough)]
        codes = dataset[index]["codes"]  # type: ignore[index]
        prompt = codes[:, :prompt_length].to(module.head.weight.device)
        generated = module.generate(prompt, total_length, self.temperature, self.seed)
        rate = int(codec.sample_rate)
        return {
            "original": Audio(dataset.wave(index), rate),  # type: ignore[attr-defined]
            "round_trip": Audio(_decode(codec, codes), rate),
            "continuation": Audio(_decode(codec, generated.cpu()), rate),
        }


def _decode(codec: Any, codes: Tensor) -> Tensor:
    wave: Tensor = codec.decode(codes[None])
    if wave.ndim != 2 or len(wave) != 1:
        found = f"{type(codec).__name__}.decode gave {list(wave.shape)} for codes {[1, *codes.shape]}"
        raise ValueError(f"Continuation: {found}; expected [1, samples]")
    return wave[0]
