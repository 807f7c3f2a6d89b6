"""The GAN of digits: exact resume, ranks, its report and its distance."""

import pytest
import torch
from choices import Choices, assert_resumes_exactly
from matplotlib.figure import Figure

from runner.engines import Engine, Engines
from runner.examples.digits import Digits
from runner.examples.gan import (
    Discriminator,
    GeneratedImages,
    Generator,
    feed_discriminator,
    feed_generator,
    frechet_distance,
)

SMALL = ["experiment=gan", "engines.discriminator.model.width=4", "engines.generator.model.width=4"]
SMALL += ["engines.generator.every=2", "data.batch_size=15", "report.rows=2", "distributed.device=cpu"]
SMALL += ["trainer.steps=5", "trainer.save_every=5", "trainer.eval_every=5", "trainer.log_every=1"]


@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupted_run_equals_the_uninterrupted_one(tmp_path, count):
    distributed = ["distributed=ddp", "trainer.accumulate=3"] if count > 1 else []
    assert_resumes_exactly(Choices(tmp_path), count, 5, *SMALL, *distributed)


def test_the_distance_falls_in_two_hundred_steps():
    torch.manual_seed(0)
    discriminator, generator = Discriminator(width=16), Generator(width=32)
    feeders = {"discriminator": feed_discriminator, "generator": feed_generator}
    modules = {"discriminator": discriminator, "generator": generator}
    engines = Engines()
    for name, module in modules.items():
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.5, 0.9))
        engines[name] = Engine(module, optimizer, feeder=feeders[name])
    engines.alternates = True
    data, report = Digits("train"), GeneratedImages(rows=2)
    before = report(generator.eval(), data)["frechet_distance"]
    generator.train()
    for step in range(200):
        engines.micro_step({"image": data.images[torch.randint(len(data), (64,))]})
        assert engines.step() == {}, step
    assert engines.report(report, data)["generator/frechet_distance"] < 0.8 * before


def test_the_report_has_a_figure_of_the_generator_and_nothing_of_the_discriminator():
    data, report = Digits("validation", max_samples=20), GeneratedImages(rows=3)
    items = report(Generator(width=4), data)
    assert isinstance(items["samples"], Figure)
    assert len(items["samples"].axes) == 9
    assert report(Discriminator(width=4), data) == {}


def test_the_frechet_distance_is_that_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(one, one + 2.0) == pytest.approx(3 * 4.0)
    # Of commuting covariances: the squared distance of the standard deviations.
    assert frechet_distance(one, 3 * one - 2 * one.mean(0)) == pytest.approx(4 * one.T.cov().trace().item())
