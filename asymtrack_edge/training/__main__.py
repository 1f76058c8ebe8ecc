"""``python -m asymtrack_edge.training``, which ``torchrun -m`` needs: the same as ``asymtrack-train``."""

from asymtrack_edge.training.command import main

raise SystemExit(main())
