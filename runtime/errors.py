"""What a user can cause and mend: every such error is a UserError, and its message is one line with the cure.

`runtime.log.run_command` ends a command on them with that line; whatever else is raised is a fault of the program.
"""

from __future__ import annotations

# A line for a terminal: what an untrusted file's words bring beyond this is cut out of the middle of a message, which
# begins with the place and ends with the cure.
LINE_LENGTH = 300


def printable(text, most: int = LINE_LENGTH) -> str:
    """`text` as one line of at most `most` characters without control codes."""
    text = str(text)
    if len(text) > 4 * most:  # before anything is done to megabytes
        text = f"{text[: 2 * most]}{text[-2 * most :]}"
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - most // 3 - 1]}\u2026{line[-(most // 3) :]}"


class UserError(Exception):
    """The message names the file or option, the place, the cause and the cure; it is one printable line."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class ConfigError(UserError, ValueError):
    """An option that cannot be taken."""


class DataError(UserError, ValueError):
    """A data set, a list or a file that cannot be used."""


class DamagedItem(DataError):
    """One item of a set cannot be read while the others may be fine: a loader may replace it."""


class PairError(UserError, ValueError):
    """Pairs or embeddings that cannot be evaluated."""


class ModelError(UserError, ValueError):
    """A net or a head that does not exist or cannot be built as asked."""


class OptimError(UserError, ValueError):
    """An optimizer or a schedule that cannot be had."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not those that were saved: an older one may do in its place."""


class DeviceError(UserError, RuntimeError):
    """A device that cannot be had or cannot do what was asked."""


class RankError(DeviceError):
    """A rank died, hung or stopped with an error: the message names it."""


class PrecisionError(UserError, RuntimeError):
    """A precision policy that cannot be had, or gradients that stay out of its range."""


class GalleryError(UserError, ValueError):
    """A folder or file that is no gallery, or one that does not fit."""


class ReportError(UserError, ValueError):
    """A run of which no report can be made."""
