"""Runs the stage: python -m stages.calibrate."""

from stages.calibrate.stage import STAGE, main
from stages.common.stage import launch

if __name__ == "__main__":
    launch(STAGE, main)
