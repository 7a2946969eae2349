"""Where tokens go: how many of the source's experts the export selects too, and how much weight fell on dropped ones.

Figures are per token, averaged over the MoE layers; by layer they are in `layers` of scores.json. In later
layers the export's tokens differ too, so this is what happens, not what the routers alone would do.
"""

from .base import Evaluation, Score, Scoring

SHARE = (0.0, 1.0)


def score(of: Scoring) -> list[Score]:
    found = []
    for name in ("router_agreement", "pruned_mass"):
        if name in of.divergence.values:
            for part, where in of.parts():
                estimate = of.bootstrap.mean(of.divergence[name], where, SHARE)
                found.append(of.score(name, estimate, "share", part, where))
    return found


ROUTER = Evaluation(
    "router",
    "the share of the source's experts that are selected too, and the gates that fell on dropped experts",
    score,
    "overlap of top-k sets; gates are the source's, normalised to 1 a token",
)
