"""What concerns the process as a whole: its event loop, signals, forks, and its end.

Start at `signals`.
"""
