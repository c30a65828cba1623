"""Digits: the 1,797 handwritten digits of 8×8 pixels that come with scikit-learn."""

import numpy as np

from widekernel.data.sources import ArraySource, ImageSource
from widekernel.errors import DataError

HELD_OUT = 0.2
"""Fraction of the digits that is held out; the numbers per class differ by at most one."""


def load_digits() -> tuple[ImageSource, ImageSource]:
    """Return the training and the held-out digits; the split is stratified and always the same.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "The digits data set comes with scikit-learn, which is not installed. "
            "Install it with: pip install widekernel[demo]"
        ) from error
    digits = load_sklearn_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 gray levels, 0 to 16
    train, held_out = train_test_split(np.arange(len(images)), test_size=HELD_OUT, stratify=digits.target, random_state=0)
    names = tuple(str(name) for name in digits.target_names)
    sources = []
    for chosen in (np.sort(train), np.sort(held_out)):
        sources.append(ArraySource(images[chosen], digits.target[chosen].tolist(), names, "digits"))
    return sources[0], sources[1]
