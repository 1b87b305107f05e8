"""PLSC's serving package by its own names: `from plsc_serving.run import PLSCServer`."""
