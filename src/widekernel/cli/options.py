"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jsonargparse

from widekernel.cli.parsing import known_keys, parse, settings_by_key
from widekernel.data.config import DataConfig
from widekernel.settings import require
from widekernel.tasks.sources import Source


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Args:
        batch_size: images per forward pass
        device: auto (CUDA if there is one), cpu, cuda or cuda:N
    """

    batch_size: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")


def with_data_of_the_run(
    parser: jsonargparse.ArgumentParser, arguments: list[str], values: dict[str, Any], source: Source
) -> tuple[dict[str, Any], bool]:
    """Let the data settings of the run that ``source`` is or lies in be the defaults.

    Returns:
        the values, and whether they name a data set.
    """
    folder = source.run_folder()
    if folder is not None:
        settings = {"data": folder.read_config().get("data") or {}}
        parser.set_defaults(settings_by_key(settings, known_keys(parser)))
        values = parse(parser, arguments)
    usual = DataConfig()
    named = values["data"]["root"] is not None or values["data"]["name"] != usual.name
    return values, named or folder is not None
