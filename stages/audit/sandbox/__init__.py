"""The clean room: a command that runs in a Linux sandbox, with its file and network access traced."""
