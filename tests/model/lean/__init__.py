"""Tests of the lean runner."""
