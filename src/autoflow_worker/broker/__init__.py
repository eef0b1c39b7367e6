"""The BullMQ side: the connection to Redis, and the calls of BullMQ's scripts.

Start at `job_queue`.
"""
