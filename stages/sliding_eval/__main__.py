"""Runs the stage: python -m stages.sliding_eval."""

from functools import partial

from stages.pack.file.decode_process import DecodeProcess


def main() -> None:
    """Fork the process that decodes the model, then import the stage, and torch with it, and run it."""
    # Decoding and the import of torch, which takes seconds, overlap.
    decoder = DecodeProcess()
    from stages.common.stage import launch
    from stages.sliding_eval import stage

    launch(stage.STAGE, partial(stage.main, decoder=decoder))


if __name__ == "__main__":
    main()
