"""Entry point of `python -m tools.compare`."""

from tools.compare.cli import main

if __name__ == "__main__":
    main()
