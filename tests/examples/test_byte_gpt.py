"""The byte-level GPT: its loss, its causality, its generation and the report."""

import math
from collections.abc import Callable
from typing import Any

import markdown
import pytest
import torch
from torch import Tensor

from runner.examples.byte_gpt import ByteGPT, SampleCode, as_code_block, rotary_table, rotate


def tiny(seed: int = 0, **settings: float) -> ByteGPT:
    torch.manual_seed(seed)
    return ByteGPT(**{"width": 32, "depth": 2, "heads": 2, "context": 16, **settings})  # type: ignore[arg-type]


def perturbed(**settings: float) -> ByteGPT:
    """A model whose blocks do something: at first they are the identity."""
    module = tiny(**settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def random_window(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_an_untrained_model_is_close_to_uniform() -> None:
    torch.manual_seed(0)
    module = ByteGPT()
    assert 0.8e6 < sum(parameter.numel() for parameter in module.parameters()) < 1.0e6
    assert module(random_window(4, 129))["loss"].item() == pytest.approx(math.log(256), abs=0.1)


def test_the_loss_is_the_mean_surprise_of_each_next_byte() -> None:
    module, window = perturbed(), random_window(3, 11)
    output = module(window)
    chances = module.logits(window[:, :-1]).log_softmax(-1)
    surprises = [-chances[row, at, int(window[row, at + 1])] for row in range(3) for at in range(10)]
    torch.testing.assert_close(output["loss"], torch.stack(surprises).mean())
    torch.testing.assert_close(output["bits_per_byte"], output["loss"].detach() / math.log(2))
    assert output["tokens"] == output["weight"] == 30
    assert not output["bits_per_byte"].requires_grad


def test_a_later_byte_does_not_change_earlier_logits() -> None:
    module, inputs = perturbed(), random_window(1, 16)
    changed = inputs.clone()
    changed[0, 9] += 1
    before, after = module.logits(inputs), module.logits(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_an_earlier_byte_changes_later_logits() -> None:
    module, inputs = perturbed(), random_window(1, 16)
    changed = inputs.clone()
    changed[0, 0] += 1
    difference = (module.logits(inputs) - module.logits(changed)).abs().amax(-1)
    assert (difference > 1e-6).all()


def test_rotary_scores_depend_only_on_distance() -> None:
    cosine, sine = rotary_table(12, 8)
    query, key = torch.randn(8), torch.randn(8)
    queries = rotate(query.expand(1, 1, 12, 8), cosine, sine)[0, 0]
    keys = rotate(key.expand(1, 1, 12, 8), cosine, sine)[0, 0]
    scores = queries @ keys.T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(queries[0], query)


def test_the_model_overfits_one_batch() -> None:
    module = tiny()
    window = random_window(4, 17)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        module(window)["loss"].backward()
        optimizer.step()
    # The first byte says which row it is, so each byte after it can be known.
    assert module(window)["loss"].item() < 0.1


def test_each_parameter_gets_a_gradient() -> None:
    module = perturbed()
    module(random_window(2, 17))["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())  # type: ignore[union-attr]


def test_bf16_autocast_gives_nearly_the_same_loss_in_float32() -> None:
    module, window = perturbed(), random_window(2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(window)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, module(window)["loss"], atol=0.05, rtol=0.02)


def test_dropout_acts_in_training_only() -> None:
    module, window = perturbed(dropout=0.5), random_window(2, 17)
    assert torch.equal(module(window)["loss"], module(window)["loss"])
    module.train()
    assert module(window)["loss"] != module(window)["loss"]


def test_a_window_beyond_the_context_is_an_error_with_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"at most 16 bytes of context, found 17; give the model and the data"):
        tiny()(random_window(1, 18))


def test_a_width_that_does_not_split_into_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 \* heads, here 6, not 32"):
        ByteGPT(width=32, heads=3)


def test_generation_is_the_same_for_the_same_seed_only() -> None:
    module = perturbed()
    first = module.generate(b"def ", 40, temperature=1.0, seed=1)
    assert len(first) == 40
    assert module.generate(b"def ", 40, temperature=1.0, seed=1) == first
    assert module.generate(b"def ", 40, temperature=1.0, seed=2) != first


def test_generation_leaves_the_global_generator_alone() -> None:
    module = perturbed()
    before = torch.get_rng_state()
    text = module.generate(b"def ", 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert module.generate(b"def ", 10, seed=1) == text


def test_temperature_zero_takes_the_likeliest_byte_of_the_last_context() -> None:
    module = perturbed()
    prompt = bytes(range(30))
    expected = bytearray(prompt)
    for _ in range(20):
        inputs = torch.tensor([list(expected[-16:])])
        expected.append(int(module.logits(inputs)[0, -1].argmax()))
    assert module.generate(prompt, 20, temperature=0.0) == bytes(expected[30:])


def test_an_empty_prompt_begins_after_the_byte_that_closes_a_file() -> None:
    module = perturbed()
    assert module.generate(b"", 10, seed=3) == module.generate(b"\0", 10, seed=3)


def test_a_low_temperature_is_closer_to_the_likeliest_text() -> None:
    module = perturbed()
    likeliest = module.generate(b"x", 30, temperature=0.0)
    assert module.generate(b"x", 30, temperature=1e-4) == likeliest
    assert module.generate(b"x", 30, temperature=5.0) != likeliest


def test_the_report_is_the_prompt_and_its_continuation() -> None:
    module = perturbed()
    report = SampleCode("def f(", num_bytes=30, temperature=1.0, seed=4)(module, None)
    text = (b"def f(" + module.generate(b"def f(", 30, 1.0, 4)).decode(errors="replace")
    assert report == {"sample": as_code_block(text)}
    assert report["sample"].startswith("    def f(")


@pytest.mark.parametrize(
    "arguments", [{"prompt": None}, {"num_bytes": 10**9}, {"num_bytes": 1.5}, {"temperature": "x"}, {"seed": 1 << 70}]
)
def test_invalid_arguments_of_a_sample_are_rejected(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SampleCode: {next(iter(arguments))} is .*, not "):
        SampleCode(**arguments)


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n\n    return `x` ** 2\n",
        "```\n# not a heading <b>\n```\n\n\n* x",
        "a\0b\rc\x1b[31m\x85 d",
    ],
)
def test_a_sample_renders_as_one_block_of_code(text: str) -> None:
    html = markdown.markdown(as_code_block(text), extensions=["tables", "fenced_code"])
    assert html.startswith("<pre><code>")
    assert html.endswith("</code></pre>")
    assert html.count("<") == 4
    shown = html.removeprefix("<pre><code>").removesuffix("</code></pre>")
    unescaped = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    expected = "".join("\ufffd" if char in "\0\r\x1b\x85" else char for char in text)
    assert unescaped.rstrip() == expected.rstrip()


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_a_model_in_half_precision_still_gives_a_float32_loss(
    change: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    output = change(tiny())(random_window(2, 17))
    assert output["loss"].dtype == torch.float32
    assert output["loss"].item() == pytest.approx(math.log(256), abs=0.1)
