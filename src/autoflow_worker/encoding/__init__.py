"""Any Python value, exception or secret as text for both stores and the log; see `results`."""
