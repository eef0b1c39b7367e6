"""Runs the same scenarios with Node's Worker and with this one, and compares what comes of them."""
