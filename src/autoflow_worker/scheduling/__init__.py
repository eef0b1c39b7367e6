"""The producing side: a task's row and its job.

Start at `scheduler`.
"""
