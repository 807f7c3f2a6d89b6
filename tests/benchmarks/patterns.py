"""Codebook patterns and their tensors against plain Python loops: `python tests/benchmarks/patterns.py`.

The loop of a layout makes lists of coordinates and no more. Tensors are compared with a loop over the coordinates, and
with one flat look-up by index tensors that lie ready, as the public implementation does it.
"""

import time

import torch

from runner.utils.pattern import VALLE, CoarseFirst, Delayed, MusicLM, Parallel, Unrolled

NUM_CODEBOOKS, TIMESTEPS, BATCH, CARD, SPECIAL = 9, 1500, 16, 64, 1024
ALL = range(NUM_CODEBOOKS)


def parallel(timesteps):
    return [[]] + [[(t, k) for k in ALL] for t in range(timesteps)]


def delayed(timesteps):
    steps = range(timesteps + NUM_CODEBOOKS - 1)
    return [[]] + [[(s - k, k) for k in ALL if 0 <= s - k < timesteps] for s in steps]


def unrolled(timesteps):
    return [[]] + [[(t, k)] for t in range(timesteps) for k in ALL]


def unrolled_late(timesteps):
    slots = range(timesteps + NUM_CODEBOOKS - 1)
    return [[]] + [[(slot - k, k)] for slot in slots for k in reversed(ALL) if 0 <= slot - k < timesteps]


def coarse_first(timesteps):
    return [[]] + [[(t, 0)] for t in range(timesteps)] + [[(t, k) for k in ALL[1:]] for t in range(timesteps)]


def musiclm(timesteps):
    firsts = range(0, NUM_CODEBOOKS, 2)
    return [[]] + [[(t, k)] for first in firsts for t in range(timesteps) for k in ALL[first : first + 2]]


PAIRS = {
    "parallel": (Parallel(NUM_CODEBOOKS), parallel),
    "delayed": (Delayed(NUM_CODEBOOKS), delayed),
    "unrolled": (Unrolled(NUM_CODEBOOKS), unrolled),
    "unrolled, delayed": (Unrolled(NUM_CODEBOOKS, delays=list(ALL)), unrolled_late),
    "coarse_first": (CoarseFirst(NUM_CODEBOOKS), coarse_first),
    "musiclm": (MusicLM(NUM_CODEBOOKS), musiclm),
    "vall_e": (VALLE(NUM_CODEBOOKS), coarse_first),
}


def build_by_loop(layout, codes):
    sequence = torch.full((*codes.shape[:2], len(layout)), SPECIAL)
    mask = torch.zeros(codes.shape[1], len(layout), dtype=torch.bool)
    for s, held in enumerate(layout):
        for t, k in held:
            sequence[:, k, s] = codes[:, k, t]
            mask[k, s] = True
    return sequence, mask


def revert_by_loop(layout, laid, shift):
    values = laid.new_empty((*laid.shape[:-1], TIMESTEPS))
    for s, held in enumerate(layout):
        for t, k in held:
            values[..., k, t] = laid[..., k, s - shift]
    return values


def look_up(flat, index):
    """Indexes a flat tensor with the special token appended; the result is [..., K, any]."""
    flat = torch.cat([flat, torch.full_like(flat[..., :1], SPECIAL)], dim=-1)
    return flat[..., index.reshape(-1)].reshape(*flat.shape[:-1], *index.shape)


def flat_indexes(pattern):
    """Returns the indexes [K, S] of build, and [K, T] of revert and of logits."""
    steps = torch.tensor(pattern.steps)
    rows = torch.arange(NUM_CODEBOOKS)[:, None]
    build = torch.full((NUM_CODEBOOKS, pattern.num_steps), NUM_CODEBOOKS * TIMESTEPS)
    build.scatter_(1, steps, rows * TIMESTEPS + torch.arange(TIMESTEPS))
    return build, rows * pattern.num_steps + steps, rows * (pattern.num_steps - 1) + steps - 1


def milliseconds(function, times):
    function()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


def row(name, part, ours, loop, flat=None):
    fast, slow = milliseconds(ours, 21), milliseconds(loop, 3)
    line = f"{name:18}{part:10}{fast:10.3f}{slow:12.2f}{slow / fast:9.0f} x"
    if flat is not None:
        ready = milliseconds(flat, 21)
        line += f"{ready:12.3f}{ready / fast:9.1f} x"
    print(line, flush=True)


def measure(name, provider, make_layout):
    layout, pattern = make_layout(TIMESTEPS), provider(TIMESTEPS)
    assert [sorted(held) for held in layout] == [sorted(held) for held in pattern.layout]
    codes = torch.randint(SPECIAL, (BATCH, NUM_CODEBOOKS, TIMESTEPS))
    sequence, _ = pattern.build(codes, SPECIAL)
    logits = torch.randn(BATCH, CARD, NUM_CODEBOOKS, pattern.num_steps - 1)
    build, revert, revert_logits = flat_indexes(pattern)
    row(name, "layout", lambda: provider(TIMESTEPS), lambda: make_layout(TIMESTEPS))
    row(
        *(name, "build", lambda: pattern.build(codes, SPECIAL), lambda: build_by_loop(layout, codes)),
        lambda: look_up(codes.flatten(1), build),
    )
    row(
        *(name, "revert", lambda: pattern.revert(sequence, SPECIAL), lambda: revert_by_loop(layout, sequence, 0)),
        lambda: look_up(sequence.flatten(1), revert),
    )
    row(
        *(name, "logits", lambda: pattern.revert_logits(logits), lambda: revert_by_loop(layout, logits, 1)),
        lambda: look_up(logits.flatten(2), revert_logits),
    )


def main():
    torch.set_num_threads(1)
    print(f"K={NUM_CODEBOOKS}, T={TIMESTEPS}, B={BATCH}, card={CARD}, int64 and float32, 1 thread, best of several")
    print(f"{'pattern':18}{'part':10}{'ours, ms':>10}{'loop, ms':>12}{'ratio':>11}{'look-up, ms':>12}{'ratio':>11}")
    for name, (provider, make_layout) in PAIRS.items():
        measure(name, provider, make_layout)


if __name__ == "__main__":
    main()
