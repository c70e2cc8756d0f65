"""A real game, and all that may happen to it: `python -m tests.torture --minutes 30 --seed 7`."""
