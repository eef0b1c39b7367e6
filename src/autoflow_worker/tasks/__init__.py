"""What a task's author touches: the definition, its options and payload, and the list of tasks.

Start at `definition`.
"""
