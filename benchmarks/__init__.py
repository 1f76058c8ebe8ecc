"""Speed, energy and accuracy: how fast, how well, and compared with what."""
