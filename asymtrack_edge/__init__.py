"""AsymTrack for edge devices: a visual object tracker from checkpoint to device."""

__version__ = "0.1.0"
