"""What measurements say about the choice of a method: gains beside the quality kept, fronts, recommendations.

Reads the user's runs and the reference measurements alike. Every gain is oriented so that more is better (2 = twice as
fast, half the bytes), every quality is a share of the unmodified model's (1 = as good). Like ``taxonomy.queries`` this
needs the standard library only; SQLAlchemy is imported when the user's runs are kept at a database URL.
"""

from taxonomy.evidence.front import fronts, goals_of, most_measured, pareto
from taxonomy.evidence.point import Cell, Front, Point
from taxonomy.evidence.reading import reference_trials, trials
from taxonomy.evidence.recommendation import Pick, Recommendation, counted, parse_share, recommend
from taxonomy.evidence.trial import BUDGETS, Trial
from taxonomy.scores import ALL_GAINS, GOALS, QUALITIES, Score

__all__ = [
    "ALL_GAINS", "BUDGETS", "GOALS", "QUALITIES", "Cell", "Front", "Pick", "Point", "Recommendation", "Score", "Trial",
    "counted", "fronts", "goals_of", "most_measured", "pareto", "parse_share", "recommend", "reference_trials",
    "trials",
]  # fmt: skip
