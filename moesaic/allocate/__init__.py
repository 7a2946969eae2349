"""Plans that may ship: made from prices, sized to the byte, measured on unseen text, one of them chosen.

setting.py is what is asked, sizes.py knows bytes on disk, candidates.py makes menus and plans, choice.py is the story,
record.py what it leaves in a run; solver/ is arithmetic alone and knows no model.
"""

from .candidates import Candidate, Traced, exact, menu_of
from .choice import Chosen, check_limit, choose, price_options, trace_frontier
from .setting import FORMATS_OFFERED, HARMS, Limit, Offer, Pricing, Setting
from .sizes import folder_bytes, stored_bytes

__all__ = [
    "FORMATS_OFFERED",
    "HARMS",
    "Candidate",
    "Chosen",
    "Limit",
    "Offer",
    "Pricing",
    "Setting",
    "Traced",
    "check_limit",
    "choose",
    "exact",
    "folder_bytes",
    "menu_of",
    "price_options",
    "stored_bytes",
    "trace_frontier",
]
