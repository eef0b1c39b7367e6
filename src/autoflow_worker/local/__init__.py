"""Servers out of wheels, and the two commands that run on them.

Start at `dev`.
"""
