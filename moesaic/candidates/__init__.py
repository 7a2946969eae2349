"""Plans that may ship: made from prices, sized to the byte, measured on unseen text, one of them chosen.

sizes.py knows bytes on disk, plans.py makes menus and plans, choose.py is the story.
"""

from .choose import FORMATS_OFFERED, Budget, Chosen, check_budget, choose
from .plans import Candidate, menu_of
from .sizes import folder_bytes, stored_bytes

__all__ = [
    "FORMATS_OFFERED",
    "Budget",
    "Candidate",
    "Chosen",
    "check_budget",
    "choose",
    "folder_bytes",
    "menu_of",
    "stored_bytes",
]
