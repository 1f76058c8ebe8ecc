"""AsymTrack in PyTorch (needs the ``export`` or ``train`` extra)."""

from asymtrack_edge.network.model import AsymTrack, Prediction, TemplateState

__all__ = ["AsymTrack", "Prediction", "TemplateState"]
