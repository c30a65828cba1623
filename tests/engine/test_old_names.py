"""Names of version 0.4, which still work."""

from __future__ import annotations

import pytest
from tests.engine.tiny import make_config, make_trainer

from widekernel.data import Shard
from widekernel.engine import Processes


def test_processes_and_run_folders(tmp_path) -> None:
    with pytest.warns(FutureWarning, match="Processes.share is now called shard"):
        assert Processes().share == Shard(0, 1)
    folder = make_trainer(make_config(tmp_path / "run")).context.folder
    with pytest.warns(FutureWarning, match="how_to_go_on is now called how_to_continue"):
        assert folder.how_to_go_on() == folder.how_to_continue()
