"""Names of version 0.4, which still work."""

from __future__ import annotations

import pytest
from tests.engine.tiny import make_config, make_trainer

from widekernel.data import Shard
from widekernel.engine import Processes, Trainer


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
