"""The BullMQ side: the connection to Redis, and what is asked of BullMQ's scripts.

Start at `job_queue`.
"""
