"""What a run needs before its data: quiet libraries, signals as errors, a run folder, the number of steps."""

import contextlib
import copy
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import datasets
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from train.checkpoint.changes import allowed_changes, described
from train.compose import Composed
from train.config import PROBLEMS, Config
from train.data.build import open_documents, pack
from train.data.loader import Data
from train.data.share import Share
from train.data.templates import Encoder
from train.data.tokenizer import give_padding, open_tokenizer
from train.errors import ConfigError, StopSignal
from train.evaluate.prompts import Prompts
from train.folder import RunFolder, folder_name
from train.generate.writing import end_marks
from train.parallel.engine import Engine
from train.parallel.launcher import number_of_processes

PATIENCE_SECONDS = 10.0
NOTES = {
    # As it is imported, by PEFT too, where the `kernels` package is not: a kernel that nothing here uses.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Of `optim.moments=bf16`, which is tested with every stage of ZeRO here.
    "DeepSpeed": "**** You are using ZeRO with an untested optimizer",
}
"""What libraries log that says nothing to whoever runs this: by logger, how it begins."""


def quiet_libraries() -> None:
    """Leaves the terminal to the run: no library bars off a terminal, no notes on what it found."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to guess
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # at DeepSpeed's calls
    for name in NOTES:
        logging.getLogger(name).addFilter(_is_no_note)
    transformers.logging.set_verbosity_error()
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _is_no_note(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOTES[record.name])


@contextlib.contextmanager
def signals_as_errors() -> Iterator[None]:
    """Raises `StopSignal` on the first SIGTERM, SIGINT or SIGHUP, so that files are closed and `exit.json` is written.

    Others are ignored for a few seconds then: a launcher that was interrupted signals its processes once more. What
    `nohup`, or a shell of a script in the background, had ignored stays so.
    """

    def stop(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if stopped and now - stopped[0] < PATIENCE_SECONDS:
            return
        stopped.append(now)
        others = number == signal.SIGTERM and number_of_processes() > 1
        hint = "; a launcher stops all when one has died: its own lines say which and why" if others else ""
        raise StopSignal(f"stopped by {signal.Signals(number).name}{hint}", number)

    stopped: list[float] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *numbers)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_folder(engine: Engine, composed: Composed) -> RunFolder | None:
    """Opens the run folder on the main process and describes the run in it; None on the others.

    Raises:
        MachineError: on every process, when the folder cannot be used.
    """
    opened: list[RunFolder] = []

    def open_folder() -> str:
        folder = RunFolder(Path(folder_name(composed)).expanduser().resolve(), composed.config)
        composed.config.run.dir = str(folder.path)
        _refuse_another(folder, composed.config)
        given = copy.deepcopy(composed)  # before hub ids become folders
        folder.once_accepted(lambda: folder.describe(given, engine.world_size, _device_name(engine.device)))
        opened.append(folder)
        return str(folder.path)

    composed.config.run.dir = engine.on_main(open_folder)
    engine.watchdog.start(Path(composed.config.run.dir))
    return opened[0] if opened else None


def _refuse_another(folder: RunFolder, config: Config) -> None:
    """Refuses to go on with a run of other settings, before any of its files is changed.

    Raises:
        ConfigError: naming what differs.
    """
    written = folder.read_config() if folder.goes_on else None
    try:
        if written is not None:
            allowed_changes(written, described(config), f"run.dir={folder.path}")
    except ConfigError as error:
        folder.close(error.reason, error.code, str(error))
        raise


def open_data(engine: Engine, folder: RunFolder | None, config: Config) -> tuple[PreTrainedTokenizerBase, Data]:
    """Opens documents and tokenizer and packs them into rows; the main process keeps the tokenizer in its folder."""
    source, vocabulary = config.data, config.model.vocab_size
    training, held_out = engine.first_on_each_host(lambda: open_documents(source))
    tokenizer = engine.on_main(lambda: open_tokenizer(source.tokenizer, vocabulary, training, source.chat_template))
    if source.format in PROBLEMS:
        give_padding(tokenizer)
    if folder:
        folder.once_accepted(lambda: tokenizer.save_pretrained(folder.path / "tokenizer"))
    return tokenizer, engine.first_on_each_host(lambda: pack(training, held_out, tokenizer, config))


def open_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
    """Reads the prompts that evaluations answer, if the run has any.

    Raises:
        DataError: for a row that is none.
        CheckpointError: when what the model's folder says of generation cannot be read.
    """
    path, answer_tokens = config.evaluate.prompts, config.evaluate.answer_tokens
    ends = [] if config.data.format in PROBLEMS else end_marks(tokenizer, config.model.init_from)  # of the export too
    if path is None:
        return None
    encoder = Encoder(tokenizer, config.data, config.model.vocab_size)
    prompts = Prompts(path, encoder, config.model.max_position_embeddings, answer_tokens, ends)
    prompts.check_metric(config.evaluate.metric)
    return prompts


def number_of_steps(config: Config, data: Data, world_size: int, done: int) -> int:
    """Gives `train.max_steps`, or the steps that `train.epochs` comes to, the last one filled with padding.

    Args:
        config: of the run.
        data: of the run.
        world_size: of the run.
        done: steps of the checkpoint that it goes on from.

    Raises:
        ConfigError: where that has more.
    """
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert data.rows is not None
    steps = -(-len(data.rows) // Share.of(config.train, 0, world_size).rows_per_step)
    if steps < done:
        raise ConfigError(
            f"train.epochs={config.train.epochs:g} is {steps} steps, less than the checkpoint to go on from has, {done}"
        )
    return steps


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
