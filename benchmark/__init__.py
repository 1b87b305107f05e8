"""What is claimed about speed and memory, and the commands that repeat it."""

import runtime  # noqa: F401  before torch
