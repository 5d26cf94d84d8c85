"""Recipes: the paper's experiments (arXiv 2405.13578) as functions, on any models, with the controls that the paper lacks.

    setup = Setup(read_sentences("corpus.txt"), read_sentences("neutral.txt"))
    print(emotions("huggyllama/llama-7b", ["huggyllama/llama-13b"], concepts, setup))
    print(RECIPES["emotions"](embedded("emotions")))          what `contrans recipe emotions` does

| recipe | in the paper |
|---|---|
| `emotions` | Fig. 2 |
| `truthfulness` | Tables 1 and 10 |
| `toxicity` | Table 2 |
| `families` | Table 3 |
| `alignment` | Table 4 |
| `two_concepts` | Table 7 |
| `token_shifts` | Table 8 |
| `checkpoints` | Fig. 3 |
| `sizes` | Fig. 4 |
| `number_of_pairs` | Fig. 5 |
"""

from contrans_tl.diagnostics.readout import token_shift
from contrans_tl.recipes.experiments import (
    alignment,
    checkpoints,
    emotions,
    families,
    fewer,
    number_of_pairs,
    on_the_questions,
    sizes,
    toxicity,
    truthfulness,
)
from contrans_tl.recipes.files import Materials, read_materials
from contrans_tl.recipes.jobs import RECIPES, Job, embedded, job_of
from contrans_tl.recipes.results import RecipeResult, Row, save_recipe
from contrans_tl.recipes.setup import Setup, load_named
from contrans_tl.recipes.shifts import token_shifts
from contrans_tl.recipes.together import Together, two_concepts

__all__ = [
    "RECIPES",
    "Job",
    "Materials",
    "RecipeResult",
    "Row",
    "Setup",
    "Together",
    "alignment",
    "checkpoints",
    "embedded",
    "emotions",
    "families",
    "fewer",
    "job_of",
    "load_named",
    "number_of_pairs",
    "on_the_questions",
    "read_materials",
    "save_recipe",
    "sizes",
    "token_shift",
    "token_shifts",
    "toxicity",
    "truthfulness",
    "two_concepts",
]
