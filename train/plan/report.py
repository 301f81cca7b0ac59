"""A plan in words and columns."""

from collections.abc import Iterable, Sequence

from train.observe.counts import count
from train.plan.figures import Figures
from train.plan.layout import Layout
from train.plan.memory import KINDS

GB = 1e9


def duration(seconds: float) -> str:
    """Writes a time for a person."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def keys_of(figures: Figures) -> dict[str, str]:
    """Gives every key that tells layouts apart, with its value."""
    parallel, train = figures.layout.config.parallel, figures.layout.config.train
    return {
        "parallel.expert": f"{parallel.expert}",
        "parallel.overlap_degree": f"{parallel.overlap_degree}",
        "parallel.zero": f"{parallel.zero}",
        "parallel.offload_optimizer": f"{parallel.offload_optimizer}".lower(),
        "parallel.offload_parameters": f"{parallel.offload_parameters}".lower(),
        "train.recompute": train.recompute,
        "train.micro_batch_size": f"{train.micro_batch_size}",
        "train.gradient_accumulation_steps": f"{train.gradient_accumulation_steps}",
    }


def words_of(figures: Figures) -> str:
    """Writes a layout as keys, those left out that do nothing."""
    idle = {("parallel.overlap_degree", "1")}
    return " ".join(
        f"{key}={value}"
        for key, value in keys_of(figures).items()
        if value not in ("false", "none") and (key, value) not in idle
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lays cells under each other, the first of a row to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def report(figures: Figures, changes: Iterable[tuple[str, Figures]], command: str) -> str:
    """Writes all that a plan says of one layout."""
    changes = list(changes)
    lines = [*_header(figures), "", *_memory(figures), "", *_time(figures), "", *_verdict(figures)]
    if not figures.fits and not changes:
        lines.append("  nothing; plan.search=true looks for several changes at once")
    lines += [
        f"  {words}: {changed.high.peak / GB:.1f} GB, {count(changed.step.tokens_per_second)} tokens/s"
        + _other_batch(figures.layout, changed.layout)
        for words, changed in changes
    ]
    return "\n".join([*lines, "", "to start it:", *(f"  {line}" for line in command.splitlines())])


def _other_batch(given: Layout, other: Layout) -> str:
    """Says of a layout that its step has other rows than the one that was given."""
    return "" if other.rows_of_step == given.rows_of_step else f", {other.rows_of_step} rows a step"


def _header(figures: Figures) -> list[str]:
    layout, device, parameters = figures.layout, figures.device, figures.layout.count
    train = layout.config.train
    hosts = device.hosts(layout.processes)
    load = ", ".join(f"{skew.mean:.2f} ({skew.source})" for skew in (figures.skews.median, figures.skews.high))
    lines = {
        "model": f"{count(parameters.total)} parameters, {count(parameters.active)} active per token, "
        f"{count(parameters.trained)} trained, {count(figures.held)} held by a process",
        "devices": f"{layout.processes} x {device.name} of {figures.capacity / GB:.0f} GB, {hosts} "
        f"host{'s' if hosts > 1 else ''}",
        "layout": words_of(figures),
        "step": f"{count(layout.tokens_of_step)} tokens: {layout.processes} processes x {train.micro_batch_size} rows "
        f"of {layout.config.data.sequence_length} x {train.gradient_accumulation_steps} accumulated, {train.precision}",
        "load": f"the rank with the most rows takes so many times an even share: {load}",
    }
    left_out = [f"not modelled: {words}" for words in layout.left_out]
    return [f"{name:>8}  {text}" for name, text in lines.items()] + left_out


def _memory(figures: Figures) -> list[str]:
    both = (figures.median, figures.high)
    rows = [["memory of a process, GB", "median", "p99"]]
    for kind in KINDS:
        values = [memory.parts.get(kind, 0.0) for memory in both]
        if any(values):
            rows.append([kind, *(f"{value / GB:.2f}" for value in values)])
    rows.append(["in all", *(f"{memory.peak / GB:.2f}" for memory in both)])
    rows.append(["at its peak, which is at", *(memory.moment for memory in both)])
    if figures.high.host:
        rows.append(["in host memory besides", *(f"{memory.host / GB:.2f}" for memory in both)])
    return columns(rows)


def _time(figures: Figures) -> list[str]:
    step, slow = figures.step, figures.slow
    rows = [["time of a step, s", "median", "p99"]]
    rows += [[part, f"{step.parts[part]:.3f}", f"{slow.parts[part]:.3f}"] for part in step.parts if step.parts[part]]
    rows.append(["in all", f"{step.seconds:.3f}", f"{slow.seconds:.3f}"])
    return columns(rows)


def _verdict(figures: Figures) -> list[str]:
    layout, device, step = figures.layout, figures.device, figures.step
    most = max(figures.high.parts, key=lambda kind: figures.high.parts[kind])
    longest = max(step.parts, key=lambda part: step.parts[part])
    hidden = f", {duration(step.hidden)} of what travels beside it" if step.hidden else ""
    lines = [
        f"{count(step.tokens_per_second)} tokens/s, {count(step.tokens_per_second / layout.processes)} of each "
        f"device; {step.mfu(device, layout):.1%} MFU on active parameters{hidden}",
        f"most of the time goes to {longest}, {step.parts[longest] / step.seconds:.0%}; most of the memory to {most}, "
        f"{figures.high.parts[most] / figures.high.peak:.0%}",
    ]
    if figures.steps:
        seconds = figures.steps * step.seconds
        lines.append(
            f"{figures.steps} steps: {duration(seconds)}, {count(seconds / 3600 * layout.processes)} device-hours, "
            f"{count(figures.steps * step.tokens)} tokens"
        )
    else:
        lines.append("how many steps train.epochs comes to only the data says: cierzo inspect_data")
    if figures.fits:
        tight = ": less than this arithmetic may be wrong by" if figures.is_tight else ""
        lines.append(f"it fits, with {figures.spare / GB:.1f} GB to spare{tight}")
    elif figures.high.peak > figures.capacity:
        lines.append(
            f"it does NOT fit: {figures.high.peak / GB:.1f} GB of {figures.capacity / GB:.0f}. By itself, makes it fit:"
        )
    else:
        lines.append(
            f"it does NOT fit the host: {figures.high.host / GB:.1f} GB a process of "
            f"{device.host_memory / GB:.0f}. By itself, makes it fit:"
        )
    return lines


def found(several: Sequence[Figures], own: Figures, least: Figures | None, command: str) -> str:
    """Writes what a search found.

    Args:
        several: the best layouts, the best first.
        own: the one that was given, which has a row too.
        least: the best on the fewest devices.
        command: that starts the least.
    """
    listed = [*several, *([] if own.layout in [one.layout for one in several] else [own])]
    rows = [["the best layouts that fit", "GB, p99", "spare", "tokens/s", "MFU", "most time goes to"]]
    for figures in listed:
        step = figures.step
        longest = max(step.parts, key=lambda part: step.parts[part])
        given = ", as given" if figures.layout == own.layout else ""
        state = " (tight)" if figures.is_tight else "" if figures.fits else " (does not fit)"
        rows.append(
            [
                words_of(figures) + given,
                f"{figures.high.peak / GB:.1f}",
                f"{figures.spare / GB:.1f}{state}",
                count(step.tokens_per_second),
                f"{step.mfu(figures.device, figures.layout):.1%}",
                f"{longest}, {step.parts[longest] / step.seconds:.0%}",
            ]
        )
    if any(one.high.host for one in listed):
        hosts = ["host GB", *(f"{one.high.host / GB:.1f}" for one in listed)]  # of a process, too
        rows = [[*row[:3], host, *row[3:]] for row, host in zip(rows, hosts, strict=True)]
    lines = columns(rows) if several else ["  no layout fits so many devices", *columns(rows)]
    return "\n".join([*lines, "", *_least(own, least, command)])


def _least(own: Figures, least: Figures | None, command: str) -> list[str]:
    """Writes of the fewest devices."""
    if least is None:
        return ["no number of devices up to 4096 is enough"]
    layout = least.layout
    host = f" and {least.high.host / GB:.1f} in host memory" if least.high.host else ""
    lines = [
        f"the fewest that do: {layout.processes} x {least.device.name}, {words_of(least)}: "
        f"{least.high.peak / GB:.1f} GB{host}, {count(least.step.tokens_per_second)} tokens/s"
    ]
    if layout.rows_of_step != own.layout.rows_of_step:
        lines.append(
            f"its step is of {layout.rows_of_step} rows, NOT the {own.layout.rows_of_step} that were given, which "
            f"{layout.processes} processes cannot share evenly: optim.lr and schedule are for another batch"
        )
    return [*lines, "to start it:", *(f"  {line}" for line in command.splitlines())]
