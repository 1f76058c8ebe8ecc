"""Speed, memory, start-up and energy by named protocols: the command ``asymtrack-bench``.

Imports torch, matplotlib and the like only where they are used: on a device without them everything
else runs.
"""
