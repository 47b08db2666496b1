"""Entry point of `python -m tools.rebuild`."""

from tools.rebuild.cli import main

if __name__ == "__main__":
    main()
