"""Entry point of `python -m tools.check_record`."""

from tools.check_record.cli import main

if __name__ == "__main__":
    main()
