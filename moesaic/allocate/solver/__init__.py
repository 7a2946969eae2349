"""Choose a format for every unit, and one count of experts to keep, under a byte budget. Pure arithmetic.

What is solved. Fix the count of experts that every layer keeps. Each unit takes one option, an option has
bytes and harm, and both add up: a multiple-choice knapsack. It is solved by a price. Charge λ nats
for each stored byte and let every unit choose alone the option of least harm + λ · bytes. What they
choose is optimal for the bytes it happens to spend: a better plan in as few bytes would have been
cheaper at this λ too (Everett 1963). As λ falls from infinity to nothing, every unit walks up the lower
convex hull of its options, and the steps of all units, sorted by nats saved per byte, are the whole curve of
such *supported* plans (Shoham and Gersho 1988). `Frontier` traces it for every kept count at once.

What a budget leaves over. Let λ be the price of the step at which the curve crosses the budget B, and let an
option's `forfeit` be what it costs at λ above its unit's cheapest. By weak duality no plan within B has
less harm than D = Σ min(harm + λ · bytes) − λ · B, and for every plan, exactly,

    harm − D = Σ forfeits + λ · bytes left unspent,        neither of which is ever negative.

A plan better than the one in hand can thus forfeit little and leave little unspent. `search` goes through
all that do, so few that it usually ends, and then the plan is optimal. Of what it has no room for it
keeps the least harm that could have come of it: that is the bound, proven either way (Pisinger's
core, 1995, in Everett's terms). Kept counts are taken in the order of their D, until D alone rules out the rest.

    frontier = Frontier.of(menu)
    frontier.fit(90 * 10**9)             --fit 90GB
    frontier.fit(menu.budget_bytes(3.2))       --bits 3.2, stored bits per weight of the source
    frontier.fit(budget_bytes, kept={64})      --experts 64; range(16, 257, 16) for multiples
    frontier.plan(*frontier.knee())      where the curve bends

What is assumed: that harms add. Any increasing function of their sum has the same best plan, so a rule that
turns prices into a predicted divergence comes after, not before. Leaves out where harm comes
from (measure), what a plan is on disk (plan), files and torch.
"""

from .frontier import Allocation, Frontier
from .menu import Choice, Menu, keep_first

__all__ = ["Allocation", "Choice", "Frontier", "Menu", "keep_first"]
