"""``python -m autoflow_worker``."""

from autoflow_worker.cli import main

if __name__ == "__main__":
    main()
