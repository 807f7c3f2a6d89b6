import math

import pytest
import torch

from runner.engines.optim import schedulers


def rates(make, num_steps, **settings):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = make(optimizer, **settings)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def test_constant_stays():
    assert rates(schedulers.constant, 3) == [2.0, 2.0, 2.0]


def test_warmup_rises_in_equal_parts_and_never_is_zero():
    assert rates(schedulers.warmup, 6, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(schedulers.warmup, 2, warmup_steps=0) == [2.0, 2.0]


def test_warmup_cosine_peaks_after_the_warmup_and_ends_at_the_final_factor():
    found = rates(schedulers.warmup_cosine, 15, warmup_steps=2, total_steps=12, final_factor=0.1)
    assert found[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert found[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[12:] == pytest.approx([0.2, 0.2, 0.2])
    assert found[2:13] == sorted(found[2:13], reverse=True)


def test_noam_falls_as_the_root_of_the_step_from_the_peak():
    found = rates(schedulers.noam, 16, warmup_steps=4)
    assert max(found) == found[3] == 2.0
    assert found[15] == pytest.approx(2.0 * math.sqrt(4 / 16))


def test_onecycle_is_torchs_on_every_groups_own_rate_and_stays_down():
    found = rates(schedulers.onecycle, 24, total_steps=20)

    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=20, cycle_momentum=False)

    assert found[:20] == pytest.approx([*rates(make, 19), found[19]])
    assert found[19] == pytest.approx(2.0 / 25 / 1e4)
    assert found[20:] == pytest.approx([found[19]] * 4)


@pytest.mark.parametrize("settings", [{"pct_start": 0.0}, {"pct_start": 1.0}, {"div_factor": 0.5}])
def test_a_onecycle_setting_out_of_range_is_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        rates(schedulers.onecycle, 1, total_steps=5, **settings)


@pytest.mark.parametrize("settings", [{"warmup_steps": -1}, {"warmup_steps": 1, "final_factor": 2}])
def test_a_setting_out_of_range_is_named(settings):
    with pytest.raises(ValueError, match="expected 0"):
        rates(schedulers.warmup_cosine, 1, total_steps=5, **settings)
