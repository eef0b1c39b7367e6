"""What an operator runs beside the worker.

Start at `check`.
"""
