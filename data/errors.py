"""What can be wrong with data, as one line that names the file, the place, the cause and the cure."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, a list or a file which cannot be used. The message is one line for the user."""


class DamagedItem(DataError):
    """One item of a set cannot be read while the others may be fine: a loader may replace it."""
