"""Workers: one process per engine, asked over standard input and output.

Knows: which engines can be measured and how each is driven best.
Does not know: tasks, rounds or figures.

This file imports nothing, so that a worker starts in an environment that holds only its engine.
"""
