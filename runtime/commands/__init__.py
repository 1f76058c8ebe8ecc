"""The commands that run on a device."""
