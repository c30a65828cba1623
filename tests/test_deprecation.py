"""Old names of arguments and moved names of modules work and warn; both names at once are refused."""

from __future__ import annotations

import warnings

import pytest

from widekernel.deprecation import renamed_arguments


@renamed_arguments(width="kernel_size")
def area(kernel_size: int, height: int = 1) -> int:
    return kernel_size * height


def test_the_old_name_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match="argument 'width' is now called 'kernel_size'") as caught:
        assert area(width=3, height=2) == 6
    assert caught[0].filename == __file__


def test_the_new_name_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert area(3) == 3
        assert area(kernel_size=3, height=2) == 6


def test_both_names_are_refused() -> None:
    with pytest.raises(TypeError, match="'width' and 'kernel_size'"):
        area(width=3, kernel_size=3)


def test_a_name_that_has_moved_works_and_warns() -> None:
    import widekernel.data
    from widekernel.errors import DataError

    with pytest.warns(FutureWarning, match=r"widekernel\.data\.DataError has moved: import it from widekernel\.errors"):
        assert widekernel.data.DataError is DataError
