"""Session for a model: a PromptSession, or one of SAM-Med2D."""

from __future__ import annotations

from stunet_plugin.interactive.find_sam import find_sam
from stunet_plugin.interactive.session import PromptSession


def open_session(model: str, fold: str | None, checkpoint: str, device: str) -> PromptSession:
    """Return the session for a model; the one place that tells kinds of models apart.

    Raises:
        PluginError: there is no such model.
    """
    if sam := find_sam(model, fold):
        # Needs transformers, which the others do not.
        from stunet_plugin.interactive.sam_session import SAMSession

        return SAMSession(sam, device)
    return PromptSession(model, fold, checkpoint, device)
