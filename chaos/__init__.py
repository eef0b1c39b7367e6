"""Programs that break workers and servers on purpose, and check what became of every job."""
