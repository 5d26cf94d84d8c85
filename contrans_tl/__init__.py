"""contrans_tl: take a concept out of one language model, carry it through an affine map, plant it in another.

    source = load_model("EleutherAI/pythia-160m")
    target = load_model("EleutherAI/pythia-410m")
    concept = refine(source, ContrastPairs.load("data/concepts/happiness.json"))
    maps = fit_maps(source, target, read_sentences("data/generic.txt"))
    moved = reformulate(concept, maps, layers={9: 18})
    with transplant(target, moved, strength=2.0):
        print(target.generate("The letter made me feel", max_new_tokens=20))

After Dong et al., ConTrans: Weak-to-Strong Alignment Engineering via Concept Transplantation (COLING 2025).
Importing the package is quick and touches no network: each name is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrans_tl.activations import Activations as Activations
    from contrans_tl.activations import collect as collect
    from contrans_tl.activations import pair as pair
    from contrans_tl.affine import AffineMap as AffineMap
    from contrans_tl.corpora import select_sentences as select_sentences
    from contrans_tl.data import ContrastPairs as ContrastPairs
    from contrans_tl.data import Question as Question
    from contrans_tl.data import read_sentences as read_sentences
    from contrans_tl.data import read_statements as read_statements
    from contrans_tl.evaluation import Continuations as Continuations
    from contrans_tl.evaluation import Interrupted as Interrupted
    from contrans_tl.evaluation import MultipleChoice as MultipleChoice
    from contrans_tl.evaluation import RestrictedChoice as RestrictedChoice
    from contrans_tl.evaluation import Rivals as Rivals
    from contrans_tl.evaluation import Search as Search
    from contrans_tl.evaluation import Task as Task
    from contrans_tl.evaluation import TransferReport as TransferReport
    from contrans_tl.evaluation import evaluate as evaluate
    from contrans_tl.exchange import read_exchange as read_exchange
    from contrans_tl.exchange import write_exchange as write_exchange
    from contrans_tl.export import export_folder as export_folder
    from contrans_tl.formats import ToxigenTask as ToxigenTask
    from contrans_tl.formats import emotion_concepts as emotion_concepts
    from contrans_tl.formats import persona_pairs as persona_pairs
    from contrans_tl.formats import read_behaviours as read_behaviours
    from contrans_tl.formats import read_scenarios as read_scenarios
    from contrans_tl.formats import read_toxigen as read_toxigen
    from contrans_tl.formats import read_truthfulqa as read_truthfulqa
    from contrans_tl.formats import toxigen_pairs as toxigen_pairs
    from contrans_tl.harness import harness_model as harness_model
    from contrans_tl.heads import HeadMaps as HeadMaps
    from contrans_tl.heads import HeadVectors as HeadVectors
    from contrans_tl.heads import fit_head_maps as fit_head_maps
    from contrans_tl.heads import refine_heads as refine_heads
    from contrans_tl.heads import reformulate_heads as reformulate_heads
    from contrans_tl.leakage import Leak as Leak
    from contrans_tl.leakage import check_leaks as check_leaks
    from contrans_tl.leakage import find_leaks as find_leaks
    from contrans_tl.learning import learning_curve as learning_curve
    from contrans_tl.loading import load_model as load_model
    from contrans_tl.models import HookedModel as HookedModel
    from contrans_tl.models import ModelId as ModelId
    from contrans_tl.models import identify as identify
    from contrans_tl.moments import fit_streamed as fit_streamed
    from contrans_tl.processes import joined as joined
    from contrans_tl.quality import assess as assess
    from contrans_tl.quality import split_half as split_half
    from contrans_tl.refinement import ConceptVector as ConceptVector
    from contrans_tl.refinement import refine as refine
    from contrans_tl.reformulation import LayerMaps as LayerMaps
    from contrans_tl.reformulation import fit_affine as fit_affine
    from contrans_tl.reformulation import fit_maps as fit_maps
    from contrans_tl.reformulation import reformulate as reformulate
    from contrans_tl.shards import StoredActivations as StoredActivations
    from contrans_tl.shards import store as store
    from contrans_tl.sharing import pull as pull
    from contrans_tl.sharing import pull_scores as pull_scores
    from contrans_tl.sharing import push as push
    from contrans_tl.splicing import splice as splice
    from contrans_tl.tokens import alignment as alignment
    from contrans_tl.transplantation import Injection as Injection
    from contrans_tl.transplantation import injection_hooks as injection_hooks
    from contrans_tl.transplantation import transplant as transplant

_HOME = {
    "activations": ("Activations", "collect", "pair"),
    "corpora": ("select_sentences",),
    "data": ("ContrastPairs", "Question", "read_sentences", "read_statements"),
    "evaluation": (
        "Continuations",
        "Interrupted",
        "MultipleChoice",
        "RestrictedChoice",
        "Rivals",
        "Search",
        "Task",
        "TransferReport",
        "evaluate",
    ),
    "exchange": ("read_exchange", "write_exchange"),
    "export": ("export_folder",),
    "formats": (
        "ToxigenTask",
        "emotion_concepts",
        "persona_pairs",
        "read_behaviours",
        "read_scenarios",
        "read_toxigen",
        "read_truthfulqa",
        "toxigen_pairs",
    ),
    "harness": ("harness_model",),
    "heads": ("HeadMaps", "HeadVectors", "fit_head_maps", "refine_heads", "reformulate_heads"),
    "leakage": ("Leak", "check_leaks", "find_leaks"),
    "learning": ("learning_curve",),
    "loading": ("load_model",),
    "models": ("HookedModel", "ModelId", "identify"),
    "moments": ("fit_streamed",),
    "processes": ("joined",),
    "quality": ("assess", "split_half"),
    "refinement": ("ConceptVector", "refine"),
    "affine": ("AffineMap",),
    "reformulation": ("LayerMaps", "fit_affine", "fit_maps", "reformulate"),
    "shards": ("StoredActivations", "store"),
    "sharing": ("pull", "pull_scores", "push"),
    "splicing": ("splice",),
    "tokens": ("alignment",),
    "transplantation": ("Injection", "injection_hooks", "transplant"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'contrans_tl' has no attribute {name!r}")
    return getattr(import_module(f"contrans_tl.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
