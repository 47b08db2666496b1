"""Scripts that decided something; see README.md.

`stages` comes first: it pins the instruction set that numpy and torch read.
"""

import stages  # noqa: F401
