"""The package's errors. Each message tells the user what went wrong and what to do next."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any


class AsymTrackError(Exception):
    """Base of all errors that this package raises on purpose. Commands print them as one line and exit with code 2."""


class UsageError(AsymTrackError, ValueError):
    """An invalid argument, option or setting."""


class MissingDependencyError(AsymTrackError, ImportError):
    """An optional package is needed but missing; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(package, extra, purpose)  # pickled with these: another process may raise it

    def __str__(self) -> str:
        package, extra, purpose = self.args
        return f"{purpose} needs {package}, which is not installed: pip install 'asymtrack-edge[{extra}]'"


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional module; ``MissingDependencyError`` without a package, ``AsymTrackError`` if one is broken."""
    try:
        return import_module(module)
    except ImportError as error:
        package, _, part = (error.name or module).partition(".")
        if isinstance(error, ModuleNotFoundError) and not part:
            raise MissingDependencyError(package, extra, purpose) from None
        raise AsymTrackError(f"{purpose} needs {package}, which does not load: {error}: update or repair it") from None


class CheckpointError(AsymTrackError):
    """A file of weights that cannot be read or does not fit the model."""


class ManifestError(AsymTrackError):
    """A model that is missing, incomplete, altered or of another version."""


class ExportError(AsymTrackError):
    """An export that could not be made or did not pass its verification."""


class BackendError(AsymTrackError):
    """An inference backend that is missing, or an engine that does not fit this device."""


class ServerError(BackendError):
    """An inference server that does not answer. The tracker keeps its box and can go on with the next frame."""


class FrameError(AsymTrackError, ValueError):
    """A frame that is not an image the tracker can use."""


class BoxError(AsymTrackError, ValueError):
    """A box that cannot be a target."""


class SourceError(AsymTrackError):
    """A video, folder or camera that cannot be opened or read."""


class DatasetError(AsymTrackError):
    """A data set that is missing or not laid out as published."""


def without_secrets(text: str) -> str:
    """Shortens every URL in a text to ``rtsp://host:554/***``, for messages, logs and documents.

    Cameras and servers accept passwords and tokens before the host, in paths and in queries. A URL that
    went through ``Path`` has only one slash after the colon.
    """
    # Matches start at the beginning of a word only: trying each letter of a word of 100,000 would take a minute.
    scheme, host, rest = r"(\b\w+://|(?<![A-Za-z])[A-Za-z]{3,}:/)", r"([^/?#\s\"']*?)", r"((?:[/?#][^\s\"']*?)?)"
    return re.sub(scheme + host + rest + r"(?=:?(?:[\s\"']|$))", _shown, text)


def _shown(url: re.Match[str]) -> str:
    scheme, place, rest = url.groups()
    host = place.rpartition("@")[2]
    # A password with a slash in it looks like a host and a path.
    if "@" in rest or not re.fullmatch(r"(\[[\da-fA-F:.%]+\]|[\w.-]*)(:\d*)?", host):
        return f"{scheme}***"
    return scheme + host + ("" if rest in ("", "/") and host == place else "/***")
