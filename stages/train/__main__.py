"""Runs the stage: python -m stages.train."""

from stages.common.stage import launch
from stages.train.stage import STAGE, main

if __name__ == "__main__":
    launch(STAGE, main)
