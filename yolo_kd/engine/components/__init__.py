"""Concerns that a trainer hosts, one class each."""
