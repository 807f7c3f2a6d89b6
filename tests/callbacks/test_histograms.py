import pytest
from conftest import read_metrics
from run_comparison import load_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.callbacks.histograms import Histograms

SETTINGS = ["callbacks=[histograms]", "callbacks.histograms.every=4", "+model.dropout=0", "optimizer=sgd"]
SETTINGS += ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "trainer.clip_norm=0.5"]
SETTINGS += ["trainer.save_every=1", "trainer.eval_every=0", "trainer.steps=8"]


def read_histograms(run):
    reader = EventAccumulator(str(run), size_guidance={"histograms": 0})
    reader.Reload()
    return {
        (name, event.step): event.histogram_value
        for name in reader.Tags()["histograms"]
        for event in reader.Histograms(name)
    }


def test_gradients_are_those_of_the_update_and_weights_those_after_it(project):
    project.run(*SETTINGS, "hydra.run.dir=run")
    run = project.folder / "run"
    found = read_histograms(run)
    names = ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert sorted(found) == sorted(
        (f"{kind}/{name}", step) for kind in ("gradients", "weights") for name in names for step in (4, 8)
    )
    rates = {line["step"]: line["train/lr"] for line in read_metrics(run)}
    for step in (4, 8):
        before, after = load_weights(run, step - 1)[0], load_weights(run, step)[0]
        for name in names:
            weights = found[f"weights/{name}", step]
            exact = after[name].double()
            assert (weights.num, weights.min, weights.max) == (exact.numel(), exact.min().item(), exact.max().item())
            assert weights.sum == pytest.approx(exact.sum().item(), rel=1e-12)
            gradient = (before[name].double() - exact) / rates[step]
            shown = found[f"gradients/{name}", step]
            assert (shown.num, sum(shown.bucket)) == (gradient.numel(), gradient.numel())
            assert shown.sum == pytest.approx(gradient.sum().item(), abs=1e-5)
            assert shown.sum_squares == pytest.approx(gradient.square().sum().item(), abs=1e-5)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_show_the_reduced_gradients_also_of_shards(project, strategy):
    project.run(*SETTINGS, "hydra.run.dir=one")
    expected = read_histograms(project.folder / "one")
    ranks = [f"distributed={strategy}", "distributed.nproc_per_node=2", "hydra.run.dir=two"]
    project.run(*SETTINGS, *ranks, forks_workers=True)
    found = read_histograms(project.folder / "two")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].num, found[key].sum) == (value.num, pytest.approx(value.sum, abs=1e-4))


def test_only_matching_parameters_are_shown_and_a_glob_without_a_match_is_an_error(project):
    project.run(*SETTINGS, "callbacks.histograms.match=['*.bias']", "callbacks.histograms.gradients=false",
        "hydra.run.dir=run")  # fmt: skip
    assert {name for name, _ in read_histograms(project.folder / "run")} == {
        "weights/first.bias",
        "weights/second.bias",
    }
    printed = project.run(*SETTINGS, "callbacks.histograms.match=['*.bais']", status=2)
    assert "callbacks.histograms: match: '*.bais' matches no parameter; there are: first.bias, second.bias" in printed


def test_a_resumed_run_shows_a_due_step_too(project):
    project.run(*SETTINGS, "trainer.steps=3", "hydra.run.dir=run")
    project.run("resume=run", "trainer.steps=8")
    found = read_histograms(project.folder / "run")
    assert {step for _, step in found} == {4, 8}
    assert ("gradients/first.weight", 4) in found


def test_an_interval_out_of_its_range_is_an_error():
    with pytest.raises(ValueError, match="every"):
        Histograms(every=0)
