import os

print("about to fall over")
os._exit(7)
