"""What the tests share: servers, databases, worker processes and Node producers. All real."""
