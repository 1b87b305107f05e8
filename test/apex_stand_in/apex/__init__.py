"""Stands in for apex in tests: holds the project's calls to the interface that apex documents for `amp`."""

__version__ = "stand-in"
