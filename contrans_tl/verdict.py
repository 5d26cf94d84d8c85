"""Verdicts: will a concept arrive through these maps? Said before the transplant, from the source's rows alone.

    print(maps.verdict(concept))

*Presence* is how far the rows that show a concept v lie along it, in units of the rows' spread. A row at mean + c v has
s = c v^T (X^T X + lambda I)^-1 v, s_i = (x_i - mean)^T (X^T X + lambda I)^-1 v as in `LayerMaps.reweighted`; so s_i tells how
many times v row i holds. Presence is the root mean square of that over rows counted by s_i^2, times |v|, over
the root mean square of |x_i - mean|:

    presence = sqrt(sum s^4 / sum s^2) / (v^T (X^T X + lambda I)^-1 v) * |v| / rms |x_i - mean|

It is near 1 / sqrt((1 - coverage) * share of the rows that show the concept), and does not change with the scale of v or x or
with rows that occur twice. Coverage alone cannot tell a few rows that speak of the concept from many that brush it.

Thresholds were set on the six emotions of the embedded pair (`data/studies/prediction.py`: three training seeds, two targets,
twelve corpora; many more rows than dimensions): other kinds of concepts, and other models, may need others. They are for text
as it comes: few rows show a concept. In a small corpus of sentences chosen for it (`select_sentences`) most rows do, and
presence falls though coverage rises and more is carried: judge the pool that they are chosen from. No verdict replaces
`evaluate`.
"""

from dataclasses import dataclass
from typing import Literal

PRESENT, ABSENT = 0.12, 0.07
"""From the first on a concept arrived in nearly every case, below the second in nearly none.

Measured: .docs/pages/evidence/prediction.md."""
LOW_COVERAGE = 0.984
"""Between what was measured where emotions arrived and where not: below it, text that mentions the concept is missing."""


@dataclass(frozen=True)
class Verdict:
    """What a fit corpus promises for a concept."""

    concept: str
    source_layer: int
    presence: float
    coverage: float
    effective_rows: float
    """Rows that show the concept, (sum s^2)^2 / sum s^4."""
    rows: int
    d_source: int

    @property
    def outlook(self) -> Literal["arrives", "doubtful", "does not arrive"]:
        """By presence."""
        if self.presence >= PRESENT:
            return "arrives"
        return "doubtful" if self.presence >= ABSENT else "does not arrive"

    @property
    def reason(self) -> str:
        """In plain words."""
        measured = f"coverage {self.coverage:.3f}, presence {self.presence:.3f}, at source layer {self.source_layer}"
        if self.outlook == "arrives":
            return f"the corpus shows this concept: {measured}"
        if self.outlook == "doubtful":
            return f"the corpus shows this concept faintly: {measured}"
        if self.rows < self.d_source:
            return f"{self.rows} rows cannot show every direction of {self.d_source} dimensions: {measured}"
        if self.coverage < LOW_COVERAGE:
            return f"the corpus hardly shows this concept: {measured}"
        return f"the corpus only brushes this concept, or speaks of its relatives: {measured}"

    @property
    def remedy(self) -> str:
        """What to do; empty where nothing needs doing."""
        if self.outlook == "arrives":
            return ""
        if self.rows < self.d_source:
            return "fit on more sentences, at the ends of words"
        return "add text that mentions it (`select_sentences` finds it in a larger pool)"

    def __str__(self) -> str:
        return f"{self.concept}: {self.outlook}. " + "; ".join(filter(None, (self.reason, self.remedy))) + "."
