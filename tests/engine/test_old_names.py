"""Names of version 0.4, which still work."""

from __future__ import annotations

import pytest
from tests.engine.tiny import array_source, make_config, make_trainer

from widekernel.data import (
    AugmentConfig,
    EvaluationSamples,
    LoaderOptions,
    Preprocessing,
    Shard,
    TrainingLoader,
    TrainingSamples,
    evaluation_loader,
)
from widekernel.engine import Processes, Trainer

PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)


def test_loaders_take_the_shard_by_its_old_name() -> None:
    source = array_source(18)
    training = TrainingSamples(source, PREPROCESSING.train_transform(AugmentConfig()), 1)
    with pytest.warns(FutureWarning, match="'share' is now called 'shard'") as warned:
        loader = TrainingLoader(training, LoaderOptions(4), share=Shard(1, 2))
    assert loader.sampler.shard == Shard(1, 2) and warned[0].filename == __file__
    evaluation = EvaluationSamples(source, PREPROCESSING.eval_transform())
    with pytest.warns(FutureWarning, match="'share' is now called 'shard'"):
        batches = list(evaluation_loader(evaluation, LoaderOptions(4), share=Shard(1, 2)))
    assert sum(len(batch.images) for batch in batches) == 9


def test_processes_and_run_folders(tmp_path) -> None:
    with pytest.warns(FutureWarning, match="Processes.share is now called shard"):
        assert Processes().share == Shard(0, 1)
    folder = make_trainer(make_config(tmp_path / "run")).context.folder
    with pytest.warns(FutureWarning, match="how_to_go_on is now called how_to_continue"):
        assert folder.how_to_go_on() == folder.how_to_continue()


def test_the_context_of_a_trainer_by_its_old_name(tmp_path) -> None:
    new = make_trainer(make_config(tmp_path / "run"))
    with pytest.warns(FutureWarning, match="'around' is now called 'context'"):
        trainer = Trainer(new.model, new.objective, new.loader, new.config, around=new.context)
    with pytest.warns(FutureWarning, match="Trainer.around is now called context"):
        assert trainer.around is new.context
