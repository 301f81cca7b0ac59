"""`cierzo evaluate`: the held-out figures of a model, or of several side by side, without training."""

from mixtral.weights.read import WeightFolder
from train.config import PROBLEMS, Config
from train.data.build import open_documents, pack
from train.data.loader import Data
from train.data.tokenizer import give_padding, open_tokenizer
from train.errors import CheckpointError
from train.evaluate.held_out import evaluate
from train.folder import RunFolder
from train.lora import hold_model
from train.model import find_weights
from train.parallel.engine import Engine
from train.setup import open_prompts

FILE = "evaluation.json"


def evaluation(engine: Engine, folder: RunFolder | None, models: dict[str, Config]) -> str:
    """Evaluates models on their held-out rows and prompts, prints a table and writes `evaluation.json`.

    Args:
        engine: of all of them, which share its layout.
        folder: of the run; the main process's alone.
        models: their configurations, by the names that they are shown with.

    Returns:
        The closing message.
    """
    figures = {}
    for name, config in models.items():
        figures[name] = evaluate_model(engine, config)
        engine.drop()
    if folder:
        folder.write_json(FILE, {"models": figures})
        print(table(figures))
        print(f"the figures: {folder.path / FILE}")
    return f"{len(models)} evaluated"


def evaluate_model(engine: Engine, config: Config) -> dict[str, float]:
    """Loads a model, as training would, and evaluates it; every process takes part.

    Raises:
        ConfigError, CheckpointError, DataError: when it, its data or prompts cannot be used.
    """
    is_classifier = config.data.format in PROBLEMS
    engine.first_on_each_host(lambda: find_weights(config.model, classifier=is_classifier))
    source = config.data
    if is_classifier and config.lora.init_from is None and WeightFolder(config.model.init_from or "").head != "score":
        raise CheckpointError(f"model.init_from={config.model.init_from} holds no classifier")
    _, held_out = engine.first_on_each_host(lambda: open_documents(source))
    vocabulary = config.model.vocab_size
    tokenizer = engine.on_main(lambda: open_tokenizer(source.tokenizer, vocabulary, None, source.chat_template))
    if is_classifier:
        give_padding(tokenizer)
    # nothing is trained on: the held-out documents stand in, so that no others are tokenized
    data: Data = engine.first_on_each_host(lambda: pack(held_out, held_out, tokenizer, config, weighted=False))
    prompts = engine.on_main(lambda: open_prompts(config, tokenizer))
    hold_model(engine, config, tokenizer, data.labels)
    return evaluate(engine, config, data, prompts)


def table(figures: dict[str, dict[str, float]]) -> str:
    """Lays figures side by side, one line each, and the second model's less the first's where there are two."""
    names = list(figures)
    wanted = list(dict.fromkeys(figure for values in figures.values() for figure in values))
    lines = [["", *names, *(["difference"] if len(names) == 2 else [])]]
    for figure in wanted:
        values = [figures[name].get(figure) for name in names]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        if len(values) == 2:
            first, second = values
            cells.append("" if first is None or second is None else f"{second - first:+.4f}")
        lines.append([figure.removeprefix("eval_"), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
