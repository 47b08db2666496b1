"""Stand-alone commands, `python -m tools.NAME`. They may import from `stages`; no stage imports from here."""

import stages  # noqa: F401  (pins the instruction set, which must come before numpy is imported)
