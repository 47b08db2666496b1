"""Entry point of `python -m tools.audit_scorer`."""

from tools.audit_scorer.cli import main

if __name__ == "__main__":
    main()
