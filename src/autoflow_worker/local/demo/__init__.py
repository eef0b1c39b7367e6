"""The `demo` command.

Start at `run`; `kinds` lists the jobs and what each has to end as.
"""
