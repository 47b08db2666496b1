"""Runs the stage: python -m stages.tokenize."""

from stages.common.stage import launch
from stages.tokenize.stage import STAGE, main

if __name__ == "__main__":
    launch(STAGE, main)
