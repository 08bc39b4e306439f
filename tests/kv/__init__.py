"""Tests of the kv room."""
