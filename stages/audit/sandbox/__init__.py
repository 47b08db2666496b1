"""The clean room: a command run in a Linux sandbox, and watched."""
