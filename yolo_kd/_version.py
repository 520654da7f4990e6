"""The version of the package, on the lowest floor so that every module can read it."""

__version__ = "0.1.0"
