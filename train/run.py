"""A run, from its configuration to its exit code: the table of contents of this package."""

from collections.abc import Callable

from train.checkpoint.checkpoints import Checkpoints
from train.compose import Composed
from train.config import Config
from train.ending import Ending
from train.evaluate.evaluations import Evaluations
from train.finish import finish, keeper_of_best
from train.folder import RunFolder
from train.loop import train
from train.lora import trainable_model
from train.model import model_config
from train.observe.observer import Observer
from train.observe.progress import header
from train.observe.trackers import open_tracker
from train.parallel.engine import Engine
from train.parallel.layout import open_engine
from train.setup import choose_folder, number_of_steps, open_data, open_prompts, quiet_libraries, signals_as_errors
from train.start import begin, check_and_find

Work = Callable[[Engine, RunFolder | None, Config], str]


def run(composed: Composed, work: Work | None = None, *, in_folder: bool = True) -> int:
    """Does a verb's work, by default training; returns the exit code, as `exit.json` has it."""
    engine = None
    with signals_as_errors(), Ending() as ending:
        quiet_libraries()
        engine = open_engine(composed.config)
        ending.met = True
        with engine.watchdog:
            ending.folder = choose_folder(engine, composed) if in_folder else None
            ending.message = (work or training)(engine, ending.folder, composed.config)
    if engine is not None:
        engine.close(wait=ending.code == 0)
    return ending.code


def training(engine: Engine, folder: RunFolder | None, config: Config) -> str:
    """Trains, evaluates and exports; `folder` is the main process's alone. Returns the closing message."""
    checkpoints = Checkpoints(engine, folder, config)
    check_and_find(engine, config)
    tokenizer, data = open_data(engine, folder, config)
    prompts = engine.on_main(lambda: open_prompts(config, tokenizer))
    max_steps = number_of_steps(config, data, engine.world_size, checkpoints.step)
    model = trainable_model(config, model_config(config.model, tokenizer, data.labels))
    drift = begin(engine, model, checkpoints, config, data)
    engine.on_main(folder.accept if folder else lambda: None)
    if folder:
        print(header(config, model.config, str(data), max_steps, engine.world_size, engine.device.type))
    tracker = open_tracker(config.tracker, folder) if folder else None
    with Observer(folder, tracker, max_steps, model.config, config) as observer, checkpoints.finished():
        keep = keeper_of_best(engine, tokenizer, data, config, observer)
        evaluations = Evaluations(engine, config, data, prompts, keep, drift)
        train(engine, config, data, max_steps, observer, checkpoints, evaluations)
        finish(folder, engine, tokenizer, data, config, observer, evaluations.best)
    return evaluations.best.closing(observer.last["step"], max_steps)
