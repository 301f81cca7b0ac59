"""`python -m train.keys`: every key of the configuration, as the README's table."""

import json
import sys

from train.config import keys


def table() -> str:
    """Writes the keys as a Markdown table: name, default, allowed values, documentation."""
    lines = ["| key | default | allowed | what it is |", "|---|---|---|---|"]
    for item in keys():
        default = item.default if item.default and isinstance(item.default, str) else json.dumps(item.default)
        default = "needed" if default == "???" else default
        allowed = item.allowed.replace("|", r"\|")
        lines.append(f"| `{item.name}` | `{default}` | {allowed} | {item.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
