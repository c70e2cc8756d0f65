import os

print("about to fall over")  # noqa: T201
os._exit(7)
