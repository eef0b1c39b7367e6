"""Log lines; start at `configure`."""
