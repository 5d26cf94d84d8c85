"""Demo: the embedded pair. An aligned source and two larger unaligned targets, trained from different initialisations on a
generated English world by `data/train_pair.py`; six emotions and honesty, carried with all controls in about a minute.
"""

from collections.abc import Sequence
from pathlib import Path

from contrans_tl.data import ContrastPairs, read_sentences
from contrans_tl.experiment import Experiment, run_experiment
from contrans_tl.loading import load_model

CONCEPTS = ("happiness", "sadness", "anger", "fear", "disgust", "surprise", "honesty")
TARGETS = ("target-llama", "target-gpt2")
UNRELATED = 600
"""Lines of neutral.txt that the neutral-corpus control is fitted on; losses are measured on others."""
NEUTRAL = 60


def demo_data() -> Path:
    """The folder with the embedded models, concepts and corpora: inside the installed package, or the checkout's data/."""
    packaged = Path(__file__).parent / "data_files"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "data"


def run_demo(
    models: Path | None = None, *, concepts: Sequence[str] = CONCEPTS, targets: Sequence[str] = TARGETS, seed: int = 0
) -> Experiment:
    """The experiment on the embedded pair, or on another training seed's models.

    Args:
        models: folder with `source` and the targets; by default the embedded one.
    """
    data = demo_data()
    models = data / "pair" if models is None else models
    neutral = read_sentences(data / "neutral.txt")
    return run_experiment(
        load_model(models / "source", device="cpu"),
        {target: load_model(models / target, device="cpu") for target in targets},
        [ContrastPairs.load(data / "concepts" / f"{concept}.json") for concept in concepts],
        read_sentences(data / "generic.txt"),
        neutral[UNRELATED : UNRELATED + NEUTRAL],
        unrelated=neutral[:UNRELATED],
        seed=seed,
    )
