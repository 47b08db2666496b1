"""Entry point of `python -m tools.record`."""

from tools.record.cli import main

if __name__ == "__main__":
    main()
