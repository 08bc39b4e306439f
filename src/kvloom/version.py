"""The version of kvloom, read by the build and by every passport."""

__version__ = "0.1.0"
