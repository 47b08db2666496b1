"""Entry point of `python -m tools.compressor`."""

from tools.compressor.cli import main

if __name__ == "__main__":
    main()
