"""The GPT over audio codes: what it may see under each pattern, what its loss counts, and what it generates."""

import math

import pytest
import torch

from runner.examples.audio.code_gpt import CodeGPT, Continuation
from runner.tracking.media import Audio
from runner.utils.pattern import VALLE, CoarseFirst, Delayed, MusicLM, Parallel, Unrolled

CARD = 7
PATTERNS = [Parallel(3), Delayed(3), Unrolled(3), CoarseFirst(3), MusicLM(3, group_by=2), VALLE(3), Parallel(1)]


def made(pattern, seed=0):
    torch.manual_seed(seed)
    model = CodeGPT(pattern, card=CARD, width=16, depth=2, heads=2)
    for parameter in model.parameters():  # a block begins as the identity, which sees nothing of other steps
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.eval()


def drawn(batch, pattern, timesteps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CARD, (batch, pattern.num_codebooks, timesteps), generator=generator)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_code_is_predicted_from_earlier_steps_only(pattern):
    model, codes, timesteps = made(pattern), drawn(1, pattern, 5), 5
    layout = pattern(timesteps)

    def scores(given):
        sequence, _ = layout.build(given, CARD)
        return layout.revert_logits(model.logits(sequence[..., :-1]))[0]

    before = scores(codes)
    for k in range(pattern.num_codebooks):
        for t in range(timesteps):
            other = codes.clone()
            other[0, k, t] = (other[0, k, t] + 1) % CARD
            changed = (scores(other) != before).any(1)[0]  # [K, T]
            step = layout.steps[k, t]
            assert not changed[torch.from_numpy(layout.steps <= step)].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_loss_of_a_piece_does_not_depend_on_the_batch(pattern):
    model = made(pattern)
    pieces = [drawn(1, pattern, timesteps, seed=timesteps) for timesteps in (4, 7, 2)]
    alone = [model(piece, [piece.shape[2]]) for piece in pieces]
    padded = torch.zeros(3, pattern.num_codebooks, 7, dtype=torch.int64)
    for row, piece in zip(padded, pieces, strict=True):
        row[:, : piece.shape[2]] = piece[0]
    found = model(padded, [4, 7, 2])
    for name in ("loss", *(f"loss_{k + 1}" for k in range(pattern.num_codebooks))):
        assert found[name].item() == pytest.approx(sum(each[name].item() for each in alone) / 3, rel=1e-5)
    assert found["tokens"] == 13 * pattern.num_codebooks
    assert found["weight"] == 3  # each piece counts alike


def test_an_untrained_model_predicts_nearly_uniformly():
    torch.manual_seed(0)
    model = CodeGPT(Delayed(4), card=512, width=32, depth=1, heads=2)
    found = model(torch.randint(512, (2, 4, 20)), [20, 20])
    assert all(found[name].item() == pytest.approx(math.log(512), abs=0.05) for name in found if "loss" in name)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_generated_codes_begin_with_the_prompt_and_follow_the_logits(pattern):
    model, prompt = made(pattern), drawn(1, pattern, 3)[0]
    state = torch.get_rng_state()
    codes = model.generate(prompt, 6, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(codes[:, :3], prompt)
    layout = pattern(6)
    sequence, _ = layout.build(codes[None], CARD)
    likeliest = layout.revert_logits(model.logits(sequence[..., :-1]))[0][0].argmax(0)
    assert torch.equal(codes[:, 3:], likeliest[:, 3:])
    drawn_twice = [model.generate(prompt, 6, seed=seed) for seed in (4, 4, 5)]
    assert torch.equal(drawn_twice[0], drawn_twice[1])
    assert not torch.equal(drawn_twice[0], drawn_twice[2])


class Codec:
    sample_rate, frame_rate = 100, 10.0

    def decode(self, codes):
        return codes.sum(1).repeat_interleave(10, dim=1) / 100


class Pieces:
    codec = Codec()

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __getitem__(self, index):
        return {"codes": drawn(1, Delayed(3), int(self.lengths[index]), seed=index)[0]}

    def wave(self, index):
        return torch.full((int(self.lengths[index]) * 10,), 0.1 * index)


def test_the_report_has_three_sounds_of_a_piece():
    shown = Continuation(prompt_s=0.4, continued_s=0.6)(made(Delayed(3)), Pieces(3, 9, 12, 20))
    assert {name: (type(each), each.num_samples, each.sample_rate) for name, each in shown.items()} == {
        "original": (Audio, 120, 100),
        "round_trip": (Audio, 120, 100),
        "continuation": (Audio, 100, 100),
    }
    assert torch.equal(shown["continuation"].wave[:40], shown["round_trip"].wave[:40])


def test_a_dataset_without_a_piece_that_is_long_enough_is_reported():
    with pytest.raises(ValueError, match=r"no piece is 1 s long, the longest 0.90; set prompt_s lower"):
        Continuation(prompt_s=0.4, continued_s=0.6)(made(Delayed(3)), Pieces(3, 9))


def test_a_width_that_is_no_multiple_of_the_heads_is_rejected():
    with pytest.raises(ValueError, match="width is a multiple of 2"):
        CodeGPT(Parallel(2), width=10, heads=4)
