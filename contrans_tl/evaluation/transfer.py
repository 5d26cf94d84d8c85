"""Transfer: what an evaluation found, and what its controls allow to say.

The concept arrived if, in the direction that is wanted, the transplanted arm

-   is apart from the base and from every vector of every null arm, each by its own paired 95% interval. With n null vectors,
    one that is no better than they are passes at most once in n + 1 times, whatever the data: of n + 1 vectors at most one is
    apart from all the others;
-   lies further beyond the vectors drawn at random than the best of as many settings as were tried would in 1 of 20 times
    (`intervals.lead`): layers and strength were chosen for the transplanted vector, and not for them.

`data/studies/nulls.py` measures how often either says yes where nothing is.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from contrans_tl.evaluation.arms import DRAWN, NULLS
from contrans_tl.evaluation.intervals import Estimate, Lead
from contrans_tl.evaluation.selection import Setting
from contrans_tl.evaluation.steerability import Steerability
from contrans_tl.leakage import Leak

ENOUGH = 19
"""Null vectors that let at most one in twenty through."""
CHANCE = 0.05
"""What a lead on vectors drawn at random may be by chance."""


class Interrupted(KeyboardInterrupt):
    """An evaluation was stopped; what had been measured by then is in `report`, which says that it is partial."""

    def __init__(self, report: Any):
        super().__init__("interrupted; what had been measured is in .report")
        self.report = report


@dataclass(frozen=True)
class TransferReport:
    """One concept carried into one target, beside its controls."""

    concept: str
    target: str
    metric: str
    wanted: str
    """`higher` or `lower`: which way the concept should move the metric."""
    task: dict[str, Any]
    layer_source: int
    layer_target: int
    strength: float
    """Of the carried vector."""
    dose: dict[str, float]
    """The same in units of the native vector's norm and of the mean norm of the target's rows at the layer."""
    coverage: float
    """Of the concept by the fit corpus, at the source layer."""
    presence: float
    foreseen: str
    """What `LayerMaps.verdict` said at that layer, before anything was transplanted."""
    r2: float
    """Held-out R2 of the uniform map between the two layers."""
    arms: dict[str, dict[str, Estimate]]
    """Arm -> metric -> estimate, on the test split. Metrics that begin with `own_` are of the concept's own prompts;
    `loss_increase` and `kl` of neutral text, nats a token."""
    differences: dict[str, Estimate]
    """Arm -> transplanted - arm, paired, in the direction that is wanted; of an arm of several vectors, the nearest one."""
    leads: dict[str, Lead]
    """Arm of vectors drawn at random -> how far beyond them the transplanted one is, by propensity where the task has one."""
    transfer_rate: Estimate | None
    """(transplanted - base) / (native - base); None where the native vector is not apart from the base."""
    steerability: dict[str, Steerability]
    geometry: dict[str, dict[str, float]]
    """Arm -> cosine to the target's native vector, and norm; means over vectors."""
    sweep: tuple[Setting, ...]
    search: dict[str, Any]
    held_out: dict[str, int]
    """How many prompts and texts of each kind, and what they were kept apart from."""
    items: dict[str, list[float]]
    """Arm -> the metric of every test prompt, mean over vectors: what paired comparisons between reports need."""
    items_hash: str
    """Of the test prompts, in order."""
    groups: tuple[str, ...] = ()
    """Of the test prompts, in order: those of one group are resampled together."""
    prompts: tuple[str, ...] = ()
    """The first few test prompts, so that a reader sees what was asked; `texts` continue them."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Arm -> the first few continuations, where the task has such."""
    leaks: tuple[Leak, ...] = ()
    """Evaluation prompts that were seen before, where that was allowed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Arm -> why it could not be measured."""
    missing: tuple[str, ...] = ()
    """Arms that were asked for and not reached, as the evaluation was interrupted."""
    null_vectors: int = 0
    """Vectors of all null arms together."""

    @property
    def in_sample(self) -> bool:
        """Whether prompts it reports on had been seen when concept, maps or layers were made."""
        return bool(self.leaks)

    @property
    def partial(self) -> bool:
        return bool(self.missing)

    @property
    def rivals(self) -> list[str]:
        """Base and nulls that the transplanted arm is not apart from."""
        return [arm for arm in ("base", *NULLS) if arm in self.differences and self.differences[arm].low <= 0]

    @property
    def by_chance(self) -> list[str]:
        """Vectors drawn at random that the best of as many settings may lead as far by chance."""
        return [arm for arm, lead in self.leads.items() if lead.chance > CHANCE]

    @property
    def transferred(self) -> bool:
        """Whether the transplanted arm is apart from the base and every null and beyond chance."""
        return "base" in self.differences and not (self.rivals or self.by_chance or self._undecided())

    @property
    def verdict(self) -> str:
        """One sentence on what the controls allow to say."""
        name, notes = f"{self.concept} into {self.target}", self._notes()
        if not {"base", "transplanted"} <= set(self.arms):
            lost = "; ".join(f"{arm}: {why}" for arm, why in self.failures.items()) or "not reached"
            return f"{name}: nothing can be said ({lost}).{notes}"
        effect, base = (self.arms[arm][self.metric] for arm in ("transplanted", "base"))
        said = f"{name}: {self.metric} {base} -> {effect}"
        if self.transferred:
            beyond = f"; beyond what {_best_of(self.search['settings'])} reaches by chance" if self.leads else ""
            return f"{said}; apart from the base and every null control, each by its paired interval{beyond}.{notes}"
        if self.rivals:
            return f"{said}; no transfer beyond controls: not apart from {', '.join(self.rivals)}.{notes}"
        if undecided := self._undecided():
            return f"{said}; undecided: {undecided}.{notes}"
        lead = max((self.leads[arm] for arm in self.by_chance), key=lambda lead: lead.chance)
        return (
            f"{said}; no transfer beyond controls: {_best_of(lead.settings)} reaches as far with a chance of {lead.chance:.2g} "
            f"({lead.vectors} were measured).{notes}"
        )

    def _undecided(self) -> str:
        """Why nothing can be said, though no control is as good."""
        if lost := [arm for arm in ("base", *NULLS) if arm in self.failures or arm in self.missing]:
            return f"{', '.join(lost)} not measured"
        if not any(arm in self.differences for arm in NULLS):
            return "no null control was run"
        if self.search["settings"] > 1 and not self.leads:
            tell = " and ".join(DRAWN)
            return f"{self.search['settings']} settings were tried, and what their best reaches by chance only {tell} tell"
        return ""

    def _notes(self) -> str:
        notes, n = [], self.null_vectors
        if 0 < n < ENOUGH:
            notes.append(
                f"Null vectors: {n} only; one no better than they are is apart from all of them up to once in {n + 1}."
            )
        if self.in_sample:
            notes.append(f"In-sample: prompts had been seen before, {len(self.leaks)} in all.")
        if self.partial:
            notes.append(f"Partial: interrupted before {', '.join(self.missing)}.")
        if self.failures:
            notes.append(f"Failed: {'; '.join(f'{arm} ({why})' for arm, why in self.failures.items())}.")
        return "".join(f" {note}" for note in notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to report.json."""
        said = {"verdict": self.verdict, "transferred": self.transferred}
        return asdict(self) | said | {"in_sample": self.in_sample, "partial": self.partial}


def _best_of(settings: int) -> str:
    return "a random vector" if settings == 1 else f"the best of {settings} settings of a random vector"
