"""What a run needs and how long it takes, by arithmetic on its configuration. Nothing here imports torch."""
