"""Plans that may ship: made from prices, sized to the byte, measured on unseen text, one of them chosen.

sizes.py knows bytes on disk, plans.py makes menus and plans, choose.py is the story, notes.py what it leaves in a run.
"""

from .choose import (
    FORMATS_OFFERED,
    HARMS,
    Budget,
    Chosen,
    Setting,
    Traced,
    check_budget,
    choose,
    price_options,
    trace_frontier,
)
from .plans import Candidate, menu_of
from .sizes import folder_bytes, stored_bytes

__all__ = [
    "FORMATS_OFFERED",
    "HARMS",
    "Budget",
    "Candidate",
    "Chosen",
    "Setting",
    "Traced",
    "check_budget",
    "choose",
    "folder_bytes",
    "menu_of",
    "price_options",
    "stored_bytes",
    "trace_frontier",
]
