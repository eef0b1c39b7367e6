"""Tasks to copy from; `autoflow-worker demo` runs them."""
