"""Log lines.

Start at `configure`.
"""
