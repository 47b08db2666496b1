"""Runs the stage: python -m stages.pack."""

from functools import partial

from stages.pack.file.encode_process import EncodeProcess


def main() -> None:
    """Fork the process that encodes, then import the stage, and torch with it, and run it."""
    # Compiling the coder and the import of torch, which takes seconds, overlap.
    with EncodeProcess() as encoder:
        from stages.common.stage import launch
        from stages.pack import stage

        launch(stage.STAGE, partial(stage.main, encoder=encoder))


if __name__ == "__main__":
    main()
