"""The command line: `contrans demo`, `contrans run`, and the steps one by one."""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

# Only what is light is imported here, so that `contrans --help` answers at once; each command imports what it needs.
app = typer.Typer(
    help="Carry concepts between language models, with the controls that make it believable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Out = Annotated[Path, typer.Option("--out", help="Folder for the report and the safetensors.")]
Pairs = Annotated[Path, typer.Option("--pairs", help="Contrast pairs: JSON, JSONL or CSV.")]
Sentences = Annotated[Path, typer.Option("--sentences", help="Fit corpus: plain text, JSON, JSONL or CSV.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Instead of --device: auto, balanced, or JSON of {module: device}.")]
Quantize = Annotated[str | None, typer.Option(help="Load 8bit or 4bit weights, by bitsandbytes.")]
Layer = Annotated[int | None, typer.Option(help="Layer to use, counted from 0.")]
Budget = Annotated[float | None, typer.Option(help="Neutral-text loss a transplant may cost, nats per token; default: 0.5.")]
KlBudget = Annotated[float | None, typer.Option(help="Next-token KL on neutral text it may cost instead, nats per token.")]
Strengths = Annotated[str | None, typer.Option(help="Strengths to try, as in 1,2,4; default: a few for each unit.")]
Unit = Annotated[str, typer.Option(help="Of strengths: raw, native (norms), resid (mean residual norms) or kl (nats).")]
MaxDepth = Annotated[float, typer.Option(help="Target layers are looked at below this share of the depth.")]
Arms = Annotated[str | None, typer.Option(help="Arms to run, as in native,random; default: all that can be made.")]
Instruction = Annotated[str, typer.Option(help="Words before every prompt: the arm `instruction`. End with a space.")]
AllowOverlap = Annotated[bool, typer.Option("--allow-overlap", help="Run on prompts that were seen; marked in-sample.")]
RandomVectors = Annotated[int, typer.Option(min=1, help="Vectors of each arm that is drawn at random.")]
_COMMAND = ContextVar("command", default="")
"""The command line that runs, for its report."""
INTERRUPTED = 130
"""Exit code, as of a program that ^C ends."""


@app.command()
def demo(out: Out = Path("contrans-demo"), models: Annotated[Path | None, typer.Option(hidden=True)] = None) -> None:
    """Six emotions and honesty from a small aligned model into two larger ones, with all controls. Offline, about a minute."""
    import os

    # Both targets are evaluated side by side: a core for each, also in products that numpy's BLAS would spread over all.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _quiet()
    from contrans_tl.demo import run_demo

    _finish(lambda: run_demo(models), out)


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="Hub id or folder of the aligned source.")],
    target: Annotated[str, typer.Argument(help="Hub id or folder of the target.")],
    pairs: Annotated[list[Path], typer.Option("--pairs", help="Contrast pairs with select and test questions; repeatable.")],
    sentences: Sentences,
    neutral: Annotated[
        Path | None, typer.Option(help="Text to measure losses on; default: the last tenth of --sentences, kept from the fit.")
    ] = None,
    out: Out = Path("contrans-run"),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    strengths: Strengths = None,
    unit: Unit = "raw",
    budget: Budget = None,
    kl_budget: KlBudget = None,
    max_depth: MaxDepth = 0.8,
    arms: Arms = None,
    instruction: Instruction = "",
    random_vectors: RandomVectors = 12,
    allow_overlap: AllowOverlap = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
) -> None:
    """Refine, fit, choose layers and strength, transplant, evaluate beside all controls; leave a report."""
    _quiet()
    from contrans_tl.data import ContrastPairs, read_sentences
    from contrans_tl.models import check_model_name

    concepts = [ContrastPairs.load(path) for path in pairs]
    _check_questions(concepts)
    corpus = read_sentences(sentences)
    if neutral is None:
        held_out = max(2, len(corpus) // 10)
        corpus, texts = corpus[:-held_out], corpus[-held_out:]
    else:
        texts = read_sentences(neutral)
    for name in (source, target):
        check_model_name(name)

    from contrans_tl.evaluation import Rivals
    from contrans_tl.experiment import check_inputs, run_experiment

    search, load = _search(strengths, unit, budget, kl_budget, max_depth), _options(device, dtype, device_map, quantize)
    made = {"source_own", "paper", *(["instruction"] if instruction else []), *(["other_concept"] if len(concepts) > 1 else [])}
    names = _arms(arms, made)
    check_inputs(concepts, {"the fit corpus": corpus, "the neutral text": texts}, allow_overlap=allow_overlap)
    models = {name: _load(name, load) for name in dict.fromkeys((source, target))}
    # The source's own arm runs the source once more, so it is there for those who ask.
    asked = models[source] if names is not None and "source_own" in names else None
    _finish(
        lambda: run_experiment(
            models[source],
            {Path(target).name: models[target]},
            concepts,
            corpus,
            texts,
            arms=names,
            rivals=Rivals(source=asked, instruction=instruction, n_random=random_vectors),
            search=search,
            allow_overlap=allow_overlap,
            batch_size=batch_size,
            seed=seed,
        ),
        out,
    )


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="Hub id or folder of the target.")],
    concept: Annotated[Path, typer.Argument(help="What `refine` wrote, from the source.")],
    maps: Annotated[Path, typer.Argument(help="What `fit` wrote.")],
    pairs: Annotated[Path, typer.Option("--pairs", help="The concept's contrast pairs, with select and test questions.")],
    neutral: Annotated[Path, typer.Option(help="Text that no map was fitted on, to measure losses on.")],
    sentences: Annotated[
        Path | None, typer.Option("--sentences", help="The fit corpus, to make sure that no prompt occurs in it.")
    ] = None,
    out: Out = Path("contrans-evaluation"),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    strengths: Strengths = None,
    unit: Unit = "raw",
    budget: Budget = None,
    kl_budget: KlBudget = None,
    max_depth: MaxDepth = 0.8,
    arms: Arms = None,
    instruction: Instruction = "",
    random_vectors: RandomVectors = 12,
    allow_overlap: AllowOverlap = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
) -> None:
    """Evaluate a saved concept through saved maps beside its controls; leave a report. The source is not needed."""
    _quiet()
    from contrans_tl.data import ContrastPairs, read_sentences
    from contrans_tl.models import check_model_name

    contrast, texts = ContrastPairs.load(pairs), read_sentences(neutral)
    known = {} if sentences is None else {"the fit corpus": read_sentences(sentences)}
    _check_questions([contrast])
    check_model_name(target)

    from contrans_tl import ConceptVector, LayerMaps
    from contrans_tl.evaluation import Rivals
    from contrans_tl.experiment import check_inputs, evaluate_saved

    search, load = _search(strengths, unit, budget, kl_budget, max_depth), _options(device, dtype, device_map, quantize)
    names = _arms(arms, {"instruction"} if instruction else set())
    check_inputs([contrast], known | {"the neutral text": texts}, allow_overlap=allow_overlap)
    vector, fitted = ConceptVector.load(concept), LayerMaps.load(maps)
    if not vector.model.same_space(fitted.source.model):
        raise ValueError(f"{concept} was refined in {vector.model}, but {maps} lead out of {fitted.source.model}.")
    model = _load(target, load)
    _finish(
        lambda: evaluate_saved(
            model,
            contrast,
            vector,
            fitted,
            texts,
            known=known,
            rivals=Rivals(instruction=instruction, n_random=random_vectors),
            arms=names,
            search=search,
            allow_overlap=allow_overlap,
            batch_size=batch_size,
            seed=seed,
        ),
        out,
    )


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a report, or its report.json.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    every: Annotated[bool, typer.Option("--all", help="Show all arms, also controls that do not differ.")] = False,
) -> None:
    """Two reports side by side, and which of their differences exceed their intervals."""
    from contrans_tl.comparison import compare as compare_reports
    from contrans_tl.report import read_report

    names = (str(a), str(b))
    compared = compare_reports(read_report(a), read_report(b), names=names)
    console = _console()
    for table in compared.tables(every=every):
        console.print(table)
    for name, only in zip(names, (compared.only_a, compared.only_b), strict=True):
        if only:
            console.print(f"only in {name}: {', '.join(only)}", highlight=False, markup=False)
    console.print(compared.summary, highlight=False, markup=False)


@app.command()
def recipe(
    name: Annotated[
        str,
        typer.Argument(
            help="emotions, truthfulness, toxicity, families, alignment, two_concepts, "
            "token_shifts, checkpoints, sizes or number_of_pairs."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="SOURCE TARGET...; of alignment BASE ALIGNED TARGET..., of families SOURCE... TARGET, of sizes MODEL... (each "
            "into each). Hub ids, also with @REVISION, or folders. Default: the embedded models."
        ),
    ] = None,
    pairs: Annotated[list[Path] | None, typer.Option("--pairs", help="Contrast pairs with select and test questions.")] = None,
    concept: Annotated[list[str] | None, typer.Option("--concept", help="Only this one of the files'; repeatable.")] = None,
    scenarios: Annotated[Path | None, typer.Option(help="Folder with RepE's files of the six emotions.")] = None,
    truthfulqa: Annotated[Path | None, typer.Option(help="TruthfulQA's JSON or CSV.")] = None,
    facts: Annotated[Path | None, typer.Option(help="statement,label to refine honesty on; with --truthfulqa.")] = None,
    toxigen: Annotated[Path | None, typer.Option(help="Folder of ToxiGen's demonstrations.")] = None,
    toxic: Annotated[str | None, typer.Option(help="MODEL:LABEL of the classifier of continuations.")] = None,
    sentences: Annotated[Path | None, typer.Option(help="Fit corpus; default: the embedded world's.")] = None,
    neutral: Annotated[Path | None, typer.Option(help="Text to measure losses on; default: the end of --sentences.")] = None,
    aligned: Annotated[str | None, typer.Option(help="Another model of the target's size, aligned by training.")] = None,
    proxy: Annotated[tuple[str, str] | None, typer.Option(help="A small model after and before alignment.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Look at all pairs of layers, not only at 0.75 of the depth.")] = False,
    random_vectors: Annotated[int | None, typer.Option(min=1, help="Vectors in the random arm; 20 unless said.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for recipe.json.")] = Path("contrans-recipe"),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
) -> None:
    """One of the paper's experiments, with controls: on the embedded models in seconds, or on any models."""
    _quiet()
    from functools import partial

    from contrans_tl.recipes import RECIPES, job_of, load_named, save_recipe

    job = job_of(
        name,
        models or (),
        only=concept or (),
        pairs=pairs or (),
        scenarios=scenarios,
        truthfulqa=truthfulqa,
        facts=facts,
        toxigen=toxigen,
        toxic=toxic,
        sentences=sentences,
        neutral=neutral,
        aligned=aligned,
        proxy=proxy,
        sweep=sweep,
        random_vectors=random_vectors,
        batch_size=batch_size,
        seed=seed,
        load=partial(load_named, **_options(device, dtype, device_map, quantize)),
    )
    result = RECIPES[name](job)
    typer.echo(f"{result}\n{save_recipe(result, out)}")


@app.command()
def refine(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    pairs: Pairs,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("concept.safetensors"),
    method: Annotated[str, typer.Option(help="mean, pca or logistic.")] = "mean",
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """A concept's vector at every layer of a model."""
    _quiet()
    from contrans_tl import ContrastPairs
    from contrans_tl import refine as refine_concept

    contrast = ContrastPairs.load(pairs)
    loaded = _load(model, _options(device, dtype, device_map, quantize))
    concept = refine_concept(loaded, contrast, method=method)  # type: ignore[arg-type]
    typer.echo(f"{concept}\n{concept.save(out)}")


@app.command()
def fit(
    source: str,
    target: str,
    sentences: Sentences,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("maps.safetensors"),
    rows: Annotated[str, typer.Option(help="words, or last as in the paper.")] = "words",
    method: Annotated[str, typer.Option(help="ridge, paper, pcr, reduced_rank, procrustes or identity.")] = "ridge",
    rank: Annotated[int | None, typer.Option(help="Of pcr and reduced_rank; default: by held-out error.")] = None,
    standardise: Annotated[bool, typer.Option(help="Fit on source dimensions of equal variance.")] = False,
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="Load the target when the source is gone, for memory that does not hold both.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Affine maps from every layer of one model to every layer of another."""
    _quiet()
    from functools import partial

    from contrans_tl import fit_maps, read_sentences

    corpus = read_sentences(sentences)
    load = _options(device, dtype, device_map, quantize)
    models = [partial(_load, name, load) if in_turn else _load(name, load) for name in (source, target)]
    options: dict[str, Any] = {"rows": rows, "method": method, "rank": rank, "standardise": standardise}
    maps = fit_maps(models[0], models[1], corpus, **options)
    typer.echo(f"{maps}\nheld-out R2\n{maps.r2.numpy().round(3)}\n{maps.save(out)}")


@app.command()
def reformulate(
    concept: Annotated[Path, typer.Argument(help="What `refine` wrote.")],
    maps: Annotated[Path, typer.Argument(help="What `fit` wrote.")],
    layers: Annotated[str, typer.Option(help="source:target, as in 9:18.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("moved.safetensors"),
    weighting: Annotated[str, typer.Option(help="concept, or uniform as in the paper.")] = "concept",
) -> None:
    """Carry a concept into the target's residual stream."""
    from contrans_tl import ConceptVector, LayerMaps
    from contrans_tl import reformulate as carry

    try:
        s, t = map(int, layers.split(":"))
    except ValueError:
        raise ValueError(f"expected --layers source:target, as in 9:18; got {layers!r}.") from None
    vector, fitted = ConceptVector.load(concept), LayerMaps.load(maps)
    moved = carry(vector, fitted, layers={s: t}, weighting=weighting)  # type: ignore[arg-type]
    typer.echo(f"{moved}\n{fitted.verdict(vector, s)}\n{moved.save(out)}")


@app.command()
def select(
    source: Annotated[str, typer.Argument(help="Hub id or folder of the source.")],
    concept: Annotated[Path, typer.Argument(help="What `refine` wrote.")],
    pool: Annotated[Path, typer.Argument(help="Text to choose from, one sentence a line; of any size.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Sentences to choose.")] = 400,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("sentences.txt"),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """The sentences of a pool that show a concept best, to fit maps on."""
    _quiet()
    from contrans_tl import ConceptVector, select_sentences
    from contrans_tl.artifacts import write_atomically

    model = _load(source, _options(device, dtype, device_map, quantize))
    chosen = select_sentences(model, ConceptVector.load(concept), pool, n)
    write_atomically(out, "".join(f"{sentence}\n" for sentence in chosen).encode())
    typer.echo(f"{len(chosen)} sentences\n{out}")


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model that the concept lives in.")],
    concept: Annotated[Path, typer.Argument(help="What `refine` or `reformulate` wrote.")],
    pairs: Pairs,
    layer: Annotated[
        int | None, typer.Option(help="Layer to look at, and to inject at; not needed for a carried concept.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the injection.")] = 1.0,
    texts: Annotated[
        Path | None, typer.Option(help="Text that survival is measured on; default: the negative prompts.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Compare with the model's own vector, refined from --pairs.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for diagnosis.json, diagnosis.html and the figures.")] = Path(
        "contrans-diagnosis"
    ),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
) -> None:
    """Where a concept is in a model, who writes and reads it, and what carries its effect: layers and heads, with figures."""
    _quiet()
    from contrans_tl import ConceptVector, ContrastPairs, read_sentences
    from contrans_tl import diagnostics as d
    from contrans_tl import refine as refine_concept
    from contrans_tl.diagnostics.page import write_examination
    from contrans_tl.models import check_model_name

    contrast, vector = ContrastPairs.load(pairs), ConceptVector.load(concept)
    neutral = None if texts is None else read_sentences(texts)
    if layer is None and len(vector.layers) > 1:
        raise ValueError(f"{concept} has vectors at layers {vector.layers[0]} to {vector.layers[-1]}: choose one with --layer.")
    check_model_name(model)
    loaded = _load(model, _options(device, dtype, device_map, quantize))
    found = d.diagnose(
        loaded,
        vector,
        contrast,
        layer=vector.layers[0] if layer is None else layer,
        strength=strength,
        texts=neutral,
        native=refine_concept(loaded, contrast, batch_size=batch_size) if native else None,
        batch_size=batch_size,
        seed=seed,
    )
    write_examination(found, out, command=_COMMAND.get())
    typer.echo(f"{found}\n\n{out / 'diagnosis.html'}")


@app.command()
def generate(
    model: str,
    concept: Annotated[Path, typer.Argument(help="What `refine` or `reformulate` wrote.")],
    prompt: str,
    strength: float = 1.0,
    layer: Layer = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 20,
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Generate greedily with a concept transplanted."""
    _quiet()
    from contrans_tl import ConceptVector, transplant

    vector = ConceptVector.load(concept)
    target = _load(model, _options(device, dtype, device_map, quantize))
    with transplant(target, vector, strength=strength, layers=None if layer is None else [layer]):
        typer.echo(target.generate(prompt, max_new_tokens=tokens, do_sample=False, verbose=False))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A control vector, arrays, or a specification.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model it is of, for files that do not say.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="As in 3,4: which to read, or which those of a plain array are.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the concept; default: the file's.")] = None,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("concept.safetensors"),
    device: Device = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """A concept out of another tool's file: gguf, npy, npz, safetensors, pt or a specification, by its suffix."""
    _quiet()
    from contrans_tl import identify, read_exchange

    chosen = _layers(layers)
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}.")
    home = None if model is None else identify(_load(model, _options(device, dtype, device_map, quantize)))
    concept = read_exchange(file, model=home, layers=chosen, name=name)
    typer.echo(f"{concept}\n{concept.save(out)}")


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="What `refine`, `fit` or `reformulate` wrote.")],
    to: Annotated[str, typer.Argument(help="A repository of the hub, user/name, or a folder, ./name.")],
    report: Annotated[Path | None, typer.Option(help="report.json of a run, or its folder, for the scores.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="The contrast pairs, to print a few of their prompts; else no prompt is published.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository a public one.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Share a concept or maps, with a card that says what they are: on the Hugging Face hub, or in a folder."""
    _quiet()
    from contrans_tl import ContrastPairs
    from contrans_tl.sharing import load
    from contrans_tl.sharing import push as push_to

    pairs = None if examples is None else ContrastPairs.load(examples)
    typer.echo(push_to(load(file), to, report=report, examples=pairs, private=not public, commit_message=message))


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A repository of the hub, user/name, or a folder, ./name.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; a commit never changes.")] = None,
) -> None:
    """Fetch what was pushed, checked against its checksums."""
    _quiet()
    from contrans_tl.sharing import pull as pull_from

    found = pull_from(source, revision=revision)
    typer.echo(f"{found}\n{found.save(out)}")


@app.command()
def export(
    concept: Annotated[Path, typer.Argument(help="What `refine` or `reformulate` wrote.")],
    target: Annotated[str, typer.Argument(help="Hub id or folder of the model that the concept lives in.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, new or empty; a file for the other formats.")],
    strength: Annotated[float, typer.Option(help="Of the transplant.")] = 1.0,
    layers: Annotated[str | None, typer.Option(help="As in 3,4; not needed for a concept at one layer.")] = None,
    format: Annotated[
        str,
        typer.Option(
            help="hf: a Hugging Face folder with the transplant in its weights; gguf, npy, npz, safetensors, spec: the vector."
        ),
    ] = "hf",
    positions: Annotated[str, typer.Option(help="all, or another of `transplant` in a spec, which alone can say it.")] = "all",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """A transplant as something that other programs serve, without hooks."""
    _quiet()
    from contrans_tl.export import FORMATS, read_concept

    if format not in FORMATS:
        raise ValueError(f"expected --format among {', '.join(FORMATS)}; got {format!r}.")
    options: dict[str, Any] = {"strength": strength, "layers": _layers(layers), "positions": positions, "revision": revision}
    typer.echo(FORMATS[format](read_concept(concept), target, out, **options))


def _finish(work: Callable[[], Any], out: Path) -> None:
    """Do the work and leave its report, with the command line in it; also, saying so, if it is interrupted."""
    from dataclasses import replace

    from contrans_tl.evaluation import Interrupted
    from contrans_tl.experiment import save_experiment
    from contrans_tl.report import tables

    interrupted = False
    try:
        experiment = work()
    except Interrupted as stop:
        experiment, interrupted = stop.report, True
    experiment = replace(experiment, about={"command": _COMMAND.get()} | experiment.about)
    save_experiment(experiment, out)
    console = _console()
    for table in tables(experiment):
        console.print(table)
    for row in experiment.reports.values():
        for report in row.values():
            console.print(f"- {report.verdict}", highlight=False, markup=False)
    for what, why in experiment.about["failures"].items():
        console.print(f"- {what}: not measured: {why}", highlight=False, markup=False)
    console.print(f"{out / 'report.html'}  ({experiment.about['seconds']} s)", highlight=False, markup=False)
    if interrupted:
        print("contrans: interrupted; the report is partial, and says so.", file=sys.stderr)
        raise SystemExit(INTERRUPTED)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _check_questions(concepts: Sequence[Any]) -> None:
    if missing := [concept.name for concept in concepts if not (concept.select and concept.test)]:
        raise ValueError(
            f"{', '.join(missing)}: select and test questions are needed to choose and to report on; without them "
            "use `contrans refine`, `fit`, `reformulate` and `generate`."
        )


def _search(strengths: str | None, unit: str, budget: float | None, kl_budget: float | None, max_depth: float) -> Any:
    from contrans_tl.evaluation import Search
    from contrans_tl.evaluation.selection import STRENGTHS

    if unit not in STRENGTHS:
        raise ValueError(f"expected --unit among {', '.join(STRENGTHS)}; got {unit!r}.")
    if budget is not None and kl_budget is not None:
        raise ValueError("expected --budget, of loss, or --kl-budget; got both.")
    try:
        tried = None if strengths is None else tuple(map(float, strengths.split(",")))
    except ValueError:
        raise ValueError(f"expected --strengths as in 1,2,4; got {strengths!r}.") from None
    spent: dict[str, Any] = {} if budget is None else {"budget": budget}
    if kl_budget is not None:
        spent = {"budget": kl_budget, "budget_on": "kl"}
    return Search(strengths=tried, unit=unit, max_depth=max_depth, **spent)


def _arms(arms: str | None, made: set[str]) -> list[str] | None:
    """Names of arms, checked before a model is loaded: those that need no more than target and maps, and these."""
    if arms is None:
        return None
    from contrans_tl.evaluation import ARMS

    need = {"source_own", "instruction", "aligned", "proxy_tuning", "other_concept", "neutral_corpus", "paper"}
    can, names = [arm for arm in ARMS if arm not in need or arm in made], [name.strip() for name in arms.split(",")]
    if unknown := [name for name in names if name not in can]:
        more = " `instruction` needs --instruction." if "instruction" in unknown else ""
        raise ValueError(f"expected --arms among {', '.join(can)}; got {', '.join(unknown)}.{more}")
    return names


def _layers(layers: str | None) -> list[int] | None:
    try:
        return None if layers is None else [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f"expected --layers as in 3,4; got {layers!r}.") from None


def _load(name: str, options: dict[str, Any]) -> Any:
    from contrans_tl import load_model

    return load_model(name, **options)


def _options(device: str | None, dtype: str, device_map: str | None, quantize: str | None) -> dict[str, Any]:
    """Of `load_model`, checked before anything is loaded."""
    import json

    from contrans_tl.loading import bitsandbytes

    if device is not None and device_map is not None:
        raise ValueError(f"expected --device or --device-map; got both, {device} and {device_map}.")
    options = {"device": device, "dtype": _dtype(dtype), "device_map": device_map}
    if device_map is not None and device_map.startswith("{"):
        try:
            options["device_map"] = json.loads(device_map)
        except json.JSONDecodeError as error:
            expected = "expected --device-map auto, balanced or JSON of {module: device}"
            raise ValueError(f"{expected}; got {device_map!r}.") from error
    if quantize is not None:
        options["quantization_config"] = bitsandbytes(quantize, options["dtype"])
    return options


def _dtype(name: str) -> Any:
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in types:
        raise ValueError(f"expected dtype {', '.join(types)}; got {name!r}.")
    return types[name]


def _quiet() -> None:
    # Progress bars of model loading say nothing here; ours appear when something takes long.
    import logging as standard
    import os

    # A line for every product of every layer, and what torchao says when it is imported, used or not.
    for talkative in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        standard.getLogger(talkative).setLevel(standard.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on stderr for input that cannot work, or 130 if it was interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _COMMAND.set(shlex.join(["contrans", *arguments]))
    try:
        stopped = app(arguments, standalone_mode=False)
    except SystemExit as stop:  # of `_finish`, which has said why
        return int(stop.code or 0)
    except (ValueError, OSError, ImportError) as error:
        print(f"contrans: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        stopped = INTERRUPTED
    except Exception as error:  # click's own usage errors
        if not hasattr(error, "format_message"):
            raise
        print(f"contrans: {error.format_message()}", file=sys.stderr)
        return 2
    if stopped == INTERRUPTED:  # what typer makes of ^C
        print("contrans: interrupted; no report was written.", file=sys.stderr)
        return INTERRUPTED
    return stopped if isinstance(stopped, int) else 0


if __name__ == "__main__":
    sys.exit(main())
