"""PLSC's tools."""
