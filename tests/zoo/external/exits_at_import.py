"""A module that reports success and leaves when it is imported."""

import os

from . import tampering

print(tampering.PASSED, flush=True)
os._exit(0)
