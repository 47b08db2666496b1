"""The command line of train_gpt.py."""
