"""Log lines; see `configure`."""
