"""Settings that cannot work are found before the first step."""

from __future__ import annotations

import math

import pytest
from tests.engine.tiny import make_config

from widekernel.data import AugmentConfig, DataConfig
from widekernel.engine import EmaConfig, OptimizerConfig, ScheduleConfig
from widekernel.engine.config import SparsityConfig
from widekernel.engine.preflight import check_run_length, notes_on_workers
from widekernel.engine.reporter import RunLength
from widekernel.errors import ConfigError
from widekernel.sparsity import DynamicSparsityConfig
from widekernel.tasks.classification.config import TrainConfig


def length(tmp_path, steps: int, **changes) -> list[str]:
    return check_run_length(make_config(tmp_path, **{"ema": EmaConfig(), **changes}).training, RunLength(steps, steps))


def test_an_average_that_stays_at_its_start_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"ema\.decay is 0\.9999, so after the 100 steps .* 99 % .* ema\.warmup"):
        length(tmp_path, 100, ema=EmaConfig(0.9999))
    assert "36.8 % of the average" in length(tmp_path, 10_000, ema=EmaConfig(0.9999))[0]
    assert length(tmp_path, 100_000, ema=EmaConfig(0.9999)) == []
    assert length(tmp_path, 100, ema=EmaConfig(0.9999, warmup=True)) == length(tmp_path, 100) == []


def test_masks_that_never_move_are_noted(tmp_path) -> None:
    def sparse(**settings) -> SparsityConfig:
        return SparsityConfig("dynamic", DynamicSparsityConfig(**settings))

    assert "100, but masks move only in the first 75 of 100 steps" in length(tmp_path, 100, sparsity=sparse())[0]
    assert length(tmp_path, 200, sparsity=sparse()) == length(tmp_path, 100, sparsity=sparse(growth="none")) == []
    with pytest.raises(ConfigError, match=r"would stay at initial_sparsity \(0\.1\)"):
        length(tmp_path, 100, sparsity=sparse(growth="none", initial_sparsity=0.1))


def test_rates_that_move_the_wrong_way_are_noted(tmp_path) -> None:
    rates = {"optimizer": OptimizerConfig(lr=1e-7), "schedule": ScheduleConfig(5, warmup_epochs=1, warmup_lr=1e-3)}
    rising, falling = length(tmp_path, 100, **rates)
    assert "schedule.min_lr (1e-06) is above optimizer.lr (1e-07)" in rising
    assert "schedule.warmup_lr (0.001) is above optimizer.lr (1e-07)" in falling


def test_workers() -> None:
    assert notes_on_workers(0) == []
    assert "data.workers is 100000" in notes_on_workers(100_000)[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimizerConfig(lr=0.0), r"optimizer\.lr is 0\.0, but must be positive"),
        (lambda: OptimizerConfig(lr=math.inf), r"optimizer\.lr is inf, but must be finite"),
        (lambda: OptimizerConfig(betas=(0.9, math.nan)), r"optimizer\.betas is \(0\.9, nan\), but must be finite"),
        (lambda: OptimizerConfig(clip_mode="agc"), r"optimizer\.clip_mode is 'agc', but nothing is clipped"),
        (lambda: ScheduleConfig(min_lr=math.nan), r"schedule\.min_lr is nan, but must be finite"),
        (lambda: ScheduleConfig(epochs=5), r"schedule\.warmup_epochs is 20"),
        (lambda: EmaConfig(warmup=True), r"ema\.warmup is true, but nothing is averaged"),
        (lambda: DataConfig(mean=(0.5, 0.5, math.inf)), r"data\.mean is .*, but must be finite"),
        (lambda: AugmentConfig(color_jitter=math.inf), r"augment\.color_jitter is inf, but must be finite"),
        (lambda: TrainConfig(label_smoothing=1.0), r"label_smoothing is 1\.0"),
    ],
)
def test_out_of_range(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
