"""Any Python value, exception or secret as text that both stores and the log take."""
