"""Benchmarks that a user runs on the own machine: kvloom beside other engines, in one run.

Knows: tasks, worker processes, figures and reports.
Does not know: the engine's inside; it stands on what `kvloom` exports.

This file imports nothing, so that a worker starts in an environment that holds only its engine.
"""
