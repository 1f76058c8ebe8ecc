"""Training and fine-tuning (needs the ``train`` extra)."""
