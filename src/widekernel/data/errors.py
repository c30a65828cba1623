"""Errors of data sets and of configuration values."""

from widekernel.errors import WidekernelError


class DataError(WidekernelError, ValueError):
    """A data set that cannot be used: missing, empty, inconsistent or unreadable."""


class ConfigError(WidekernelError, ValueError):
    """A configuration value that is unknown, out of range or at odds with another one."""
