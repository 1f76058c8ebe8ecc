"""Speed, memory, start-up and energy by named protocols: the command ``asymtrack-bench``."""
