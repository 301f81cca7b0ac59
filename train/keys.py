"""`python -m train.keys`: every key of the configuration, as the README's table."""

import dataclasses
import json
import sys

from train.compose import compose
from train.config import keys


def table() -> str:
    """Writes the keys as a Markdown table: name, default with the default groups, allowed values, documentation."""
    defaults = dataclasses.asdict(compose(["train.max_steps=1"]).config)
    defaults["train"]["max_steps"] = None
    lines = ["| key | default | allowed | what it is |", "|---|---|---|---|"]
    for item in keys():
        section, name = item.name.split(".")
        value = defaults[section][name]
        default = value if value and isinstance(value, str) else json.dumps(value)
        allowed = item.allowed.replace("|", r"\|")
        lines.append(f"| `{item.name}` | `{default}` | {allowed} | {item.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
