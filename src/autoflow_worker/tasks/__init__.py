"""What a task's author uses: the definition, its options and payload, and the list of tasks.

Start at `definition`.
"""
