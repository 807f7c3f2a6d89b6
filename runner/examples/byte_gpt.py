"""A byte-level GPT, and a report with a text that it generates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
# Contexts are a few hundred bytes: with a larger base, the slowest angles would hardly change over them.
ROTARY_BASE = 1000.0
MAX_SAMPLE_BYTES = 100_000


class ByteGPT(nn.Module):
    """A decoder-only transformer over raw bytes: rotary positions, pre-norm blocks, an untied head.

    Args:
        width: size of the residual stream.
        depth: number of blocks.
        heads: attention heads; `width / heads` is even.
        context: maximum number of bytes that a prediction attends to.
        dropout: dropout probability of the embedding and of each branch, 0 to 1.

    Raises:
        ValueError: `width` is not a multiple of 2 * `heads`.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(
        self, width: int = 128, depth: int = 4, heads: int = 4, context: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"ByteGPT: width is a multiple of 2 * heads, here {2 * heads}, not {width}")
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        # Small logits: an untrained model is close to uniform, log(256) nats a byte.
        nn.init.normal_(self.head.weight, std=0.02)
        cosine, sine = rotary_table(context, width // heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, window: Tensor) -> dict[str, Tensor | int]:
        """Returns the loss of predicting each byte of `window` from the bytes before it.

        Args:
            window: uint8 [batch, time + 1], `time` at most `context`.

        Returns:
            `loss` in nats per byte, `bits_per_byte`, and the number of bytes predicted, as `tokens` and `weight`.
        """
        targets = window[:, 1:].long()
        logits = self.logits(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        count = targets.numel()
        return {"loss": loss, "bits_per_byte": loss.detach() / math.log(2), "tokens": count, "weight": count}

    def logits(self, inputs: Tensor) -> Tensor:
        """Returns the logits of the byte after each of `inputs`: int [batch, time] to float32 [batch, time, 256].

        Raises:
            ValueError: `inputs` is longer than the context.
        """
        time = inputs.shape[1]
        if time > self.context:
            raise ValueError(
                f"ByteGPT: at most {self.context} bytes of context, found {time}; "
                "give the model and the data the same context"
            )
        stream = self.dropout(self.embedding(inputs.long()))
        for block in self.blocks:
            stream = block(stream, self.cosine[:time], self.sine[:time])
        return self.head(self.norm(stream)).float()

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, temperature: float = 1.0, seed: int = 0) -> bytes:
        """Generates `num_bytes` bytes after `prompt`, the same for the same seed. Expects eval mode.

        An empty prompt begins a new file. Temperature 0 takes the most likely byte. torch's global generators are not
        used.
        """
        generator = torch.Generator().manual_seed(seed)
        text = bytearray(prompt or b"\0")
        prompt_length = len(text)
        for _ in range(num_bytes):
            recent = torch.tensor([list(text[-self.context :])], device=self.head.weight.device)
            # Sampled on the CPU, so that a seed gives the same text on every device.
            logits = self.logits(recent)[0, -1].cpu()
            if temperature > 0:
                probabilities = (logits / temperature).softmax(0)
                text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            else:
                text.append(int(logits.argmax()))
        return bytes(text[prompt_length:])


class Block(nn.Module):
    """A transformer block: causal self-attention, then an MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=width**-0.5)
        # Each block starts as the identity, so that a deep model trains as easily as a shallow one.
        for layer in (self.attention_out, self.mlp_out):
            nn.init.zeros_(layer.weight)

    def forward(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Applies the block: [batch, time, width] to the same; `cosine` and `sine` are [time, width / heads / 2]."""
        stream = stream + self.dropout(self.attend(self.attention_norm(stream), cosine, sine))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(stream)))
        return stream + self.dropout(self.mlp_out(hidden))

    def attend(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Returns the attention of each position to itself and to earlier positions: [batch, time, width]."""
        batch, time, width = stream.shape
        qkv = self.qkv(stream).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(attended.transpose(1, 2).reshape(batch, time, width))


def rotary_table(context: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of the rotary angles of each position: float32 [context, head_size / 2] each.

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864.
    """
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, head_size // 2 + 1)[:-1]
    angles = torch.arange(context)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates `states` [batch, heads, time, head_size] by the angles of their positions; keeps their dtype."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return rotated.type_as(states)


class SampleCode:
    """A report with a text that the model generates, from the same seed at each evaluation.

    Args:
        prompt: text with which the sample begins.
        num_bytes: number of bytes to generate after it.
        temperature: 0 takes the most likely byte; 1 samples from the model's distribution.
        seed: seed of the sampling.

    Raises:
        ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(self, prompt: str = "def ", num_bytes: int = 200, temperature: float = 0.8, seed: int = 0) -> None:
        if not isinstance(prompt, str) or len(prompt) > MAX_SAMPLE_BYTES:
            expected = f"a text of at most {MAX_SAMPLE_BYTES} characters"
            raise ValueError(f"SampleCode: prompt is {expected}, not {prompt!r:.60}")
        if type(num_bytes) is not int or not 0 <= num_bytes <= MAX_SAMPLE_BYTES:
            raise ValueError(f"SampleCode: num_bytes is 0 to {MAX_SAMPLE_BYTES}, not {num_bytes!r:.60}")
        if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
            raise ValueError(f"SampleCode: temperature is a number from 0 on, not {temperature!r:.60}")
        if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"SampleCode: seed is a whole number of 64 bits, not {seed!r:.60}")
        self.prompt = prompt
        self.num_bytes = num_bytes
        self.temperature = temperature
        self.seed = seed

    def __call__(self, module: ByteGPT, dataset: object) -> dict[str, str]:
        """Returns `sample`: prompt and generated text as a Markdown code block. The dataset is not used."""
        prompt = self.prompt.encode(errors="replace")
        generated = module.generate(prompt, self.num_bytes, self.temperature, self.seed)
        return {"sample": as_code_block((prompt + generated).decode(errors="replace"))}


def as_code_block(text: str) -> str:
    """Returns `text` as an indented Markdown code block, which no text can end; control characters become U+FFFD."""
    printable = "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)
    return "\n".join(f"    {line}" for line in printable.split("\n"))
