"""Runs the stage: python -m stages.audit."""

from stages.audit.stage import STAGE, main
from stages.common.stage import launch

if __name__ == "__main__":
    launch(STAGE, main)
