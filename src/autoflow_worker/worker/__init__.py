"""One task at work: jobs are fetched, run, recorded and acknowledged.

Start at `task_worker`.
"""
