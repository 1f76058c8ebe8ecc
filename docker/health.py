"""Health check: the web view answers and frames have come since the last check. Standard library only."""

import json
import os
import sys
import tempfile
import urllib.request

MEMORY = os.path.join(tempfile.gettempdir(), "asymtrack-health")


def main():
    """Exit code 0 if healthy, 1 if not."""
    url = "http://127.0.0.1:{}/health".format(os.environ.get("ASYMTRACK_PORT", "8080"))
    with urllib.request.urlopen(url, timeout=4) as answer:
        frames = json.load(answer)["frames"]
    try:
        with open(MEMORY) as file:
            before = int(file.read())
    except (OSError, ValueError):
        before = -1
    with open(MEMORY, "w") as file:
        file.write(str(frames))
    if frames == before and not os.environ.get("ASYMTRACK_FILE"):
        print(f"no frame since the last check: {frames}")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, KeyError) as problem:
        print(f"no answer: {problem}")
        sys.exit(1)
