"""The PostgreSQL side: what is written into rows, and how it gets there.

Start at `recorder`.
"""
