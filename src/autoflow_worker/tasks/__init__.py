"""What a task's author uses: definition, options, payload, task list; see `definition`."""
