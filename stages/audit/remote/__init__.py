"""A scorer in a process of its own: the program in the sandbox, and its counterpart in the audit."""
