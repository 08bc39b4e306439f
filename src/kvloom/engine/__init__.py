"""The engine: runner, memory, scheduler and sampling wired into one loop with two faces."""
