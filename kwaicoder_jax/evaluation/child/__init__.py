"""Scripts that run in interpreters of their own, outside this process: standard library only."""
