"""A header, a progress bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from tqdm import tqdm

from mixtral import MixtralConfig
from train.config import Config
from train.observe.counts import count
from train.optim import warm_up_warning


def shown(row: dict[str, Any]) -> str:
    """Writes a row's held-out figures besides the loss, each after a comma."""
    figures = [name for name in row if name.startswith("eval_") and name != "eval_loss" and "/" not in name]
    return "".join(
        f", {name.removeprefix('eval_').replace('_', ' ')} {row[name]:{',.1f' if 'perplexity' in name else '.4f'}}"
        for name in figures
    )


def drifted(row: dict[str, Any]) -> str:
    """Writes of the routers' drift, where a row has it, the figures of the layers that moved most, after a comma."""
    if "router_kl" not in row:
        return ""
    return f", router agreement at least {min(row['router_agreement']):.4f}, KL at most {max(row['router_kl']):.4f}"


def header(config: Config, model: MixtralConfig, size: str, max_steps: int, processes: int, device: str) -> str:
    """Describes a run in a few aligned lines, and warns of what can hardly be meant."""
    plural = f"{processes} process{'es' if processes > 1 else ''}"
    parameters = model.count_parameters()
    train, data = config.train, config.data
    most = "" if model.problem_type is None else "at most "
    rows = train.micro_batch_size * train.gradient_accumulation_steps * processes
    lines = {
        "model": f"Mixtral, {count(parameters.total)} parameters, {count(parameters.active)} active per token: "
        f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, top-{model.num_experts_per_tok}",
        "data": f"{data.names}: {size}; rows of {most}{data.sequence_length}, tokenizer {data.tokenizer}",
        "step": f"{most}{count(rows * data.sequence_length)} tokens: {plural} x {train.micro_batch_size} rows x "
        f"{train.gradient_accumulation_steps} accumulated",
        "run": f"{max_steps} steps in {train.precision} on {processes} x {device}",
        "folder": str(config.run.dir),
    }
    described = [f"{name:>8}  {text}" for name, text in lines.items()]
    warning = warm_up_warning(max_steps, config.optim.lr, config.schedule)
    return "\n".join(described if warning is None else [*described, warning])


class Progress:
    """Shows the steps of a run as they end."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = self._max_steps_left = max_steps
        self._done, self._seconds = 0, 0.0
        self._bar = tqdm(total=max_steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def begin_at(self, step: int) -> None:
        """Counts from a step that was reached before."""
        self._max_steps_left = self._max_steps - step
        if self._bar is not None:
            self._bar.update(step)

    def advance(self, seconds: float) -> None:
        """Counts one step and the time it took."""
        self._done, self._seconds = self._done + 1, self._seconds + seconds
        if self._bar is not None:
            self._bar.update()

    def show(self, row: dict[str, Any]) -> None:
        """Shows the figures of a logged step."""
        parts = []
        if "loss" in row:
            parts += [
                f"loss {row['loss']:.4f}",
                f"router {row['router_loss']:.3f}",
                f"{row['tokens_per_second']:,.0f} tok/s",
            ]
        held_out = f"held-out loss {row['eval_loss']:.4f}{shown(row)}{drifted(row)}" if "eval_loss" in row else ""
        if self._bar is not None:
            if parts:
                self._bar.set_postfix_str(", ".join(parts))
            if held_out:
                self.say(f"step {row['step']}: {held_out}")
            return
        if self._done:
            left = self._seconds / self._done * (self._max_steps_left - self._done)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        print("  ".join([f"step {row['step']}/{self._max_steps}", *filter(None, [held_out]), *parts]), flush=True)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
