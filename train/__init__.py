"""Everything about a run: configuration, data, parallelism, the loop and what a person sees of it."""
