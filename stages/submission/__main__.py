"""Runs the stage: python -m stages.submission."""

from stages.common.stage import launch
from stages.submission.stage import STAGE, main

if __name__ == "__main__":
    launch(STAGE, main)
