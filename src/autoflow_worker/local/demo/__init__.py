"""The `demo` command.

Start at `run`.
"""
