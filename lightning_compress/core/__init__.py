"""The lifecycle: events, state, modifiers, and the ledger of what they did."""

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.factory import ModifierFactory
from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier, ModifierInterface
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State

__all__ = [
    "Event", "EventType", "Ledger", "Lifecycle", "Modifier", "ModifierFactory", "ModifierInterface", "Needs", "Row",
    "State",
]  # fmt: skip
