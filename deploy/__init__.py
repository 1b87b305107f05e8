"""A recognizer at work: photos to aligned faces, galleries, thresholds, serving. Never the Learner."""

import runtime  # noqa: F401  before torch
