"""The classification head: margins, class centers sharded over the ranks, sampled classes, and what they cost.

`head.head.MarginHead` is the module that trains; `head.plan` says what a number of classes takes before it is built.
"""

import runtime  # noqa: F401  before torch
from head.margins import register_margin

__all__ = ["register_margin"]
