"""Tests of the compiled executor, at every CPU level that this machine runs."""
