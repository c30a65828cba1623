"""Options --shape and --kernel, which define a convolution for `widekernel bench ops` and `widekernel tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from widekernel.errors import ConfigError

if TYPE_CHECKING:
    from widekernel.bench import Case


def custom_case(values: dict[str, Any], excluded: Sequence[str]) -> Case | None:
    """Return the case that the options define; None if neither of them is given.

    Args:
        values: all options.
        excluded: options that have no effect on such a case.

    Raises:
        ConfigError: if only one of them is given, or if they are combined with an excluded option.
    """
    from widekernel.bench import parse_case

    shape, kernel = values["shape"], values["kernel"]
    if shape is None and kernel is None:
        return None
    if shape is None or kernel is None:
        raise ConfigError(f"shape is {shape!r} and kernel {kernel!r}: a custom case needs both, --shape and --kernel.")
    given = [option for option in excluded if values[option]]
    if given:
        raise ConfigError(f"--shape and --kernel define a custom case: leave {', '.join(given)} out.")
    return parse_case(shape, kernel)
