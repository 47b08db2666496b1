"""The command line of train_gpt.py: what runs from the bundle."""
