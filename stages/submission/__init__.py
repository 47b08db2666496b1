"""submission: the folder to hand in."""
