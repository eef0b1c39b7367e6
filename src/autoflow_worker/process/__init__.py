"""The process as a whole: its event loop, its signals, forks, and its end.

Start at `signals`.
"""
