"""Writes the settings table into docs/settings.md; with `--check`, fails if it is not up to date."""

import argparse
import sys
from pathlib import Path

from pydantic import SecretStr

from cli.settings import ClientSettings
from cli.stack.settings import StackSettings
from credit_service.settings import CreditSettings
from edge.settings import EnvoySettings
from gateway.settings import GatewaySettings
from inference_service.settings import InferenceSettings
from jobs_service.settings import DispatchSettings, RelaySettings, ServeSettings
from servicekit.settings import Settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
BEGIN, END = "<!-- settings: made by scripts/settings_table.py -->", "<!-- /settings -->"

READERS: dict[str, type[Settings]] = {
    # The services come first: where others read the same variable, their words and default stand in the table.
    "gateway": GatewaySettings,
    "credits": CreditSettings,
    "jobs": ServeSettings,
    "dispatch": DispatchSettings,
    "relay": RelaySettings,
    "inference": InferenceSettings,
    "envoy": EnvoySettings,
    "stack": StackSettings,
    "cli": ClientSettings,
}

# What the defaults themselves do not say.
NOTES = {
    "GENMESH_ADMIN_PORT": "stack: chosen free",  # whatever is set: the stack takes its ports from one block
}


def table() -> str:
    """A Markdown table: variable, who reads it, default, meaning."""
    rows: dict[str, tuple[list[str], list[str], str]] = {}
    for reader, settings in READERS.items():
        for name, field in settings.model_fields.items():
            default = field.get_default()
            if field.is_required():
                shown = "required"
            elif default in (None, "", ()) or isinstance(default, SecretStr):
                shown = ""
            elif isinstance(default, Path) and default.is_absolute():
                shown = f"`{default.relative_to(ROOT)}`"
            else:
                shown = f"`{default}`"
            row = rows.setdefault(f"GENMESH_{name.upper()}", ([], [shown], field.description or ""))
            row[0].append(reader)
            if name in settings.__annotations__ and shown != row[1][0]:
                row[1].append(f"{reader}: {shown}")
    servers = [reader for reader in READERS if reader not in ("stack", "cli", "envoy")]
    lines = ["| variable | read by | default | meaning |", "|---|---|---|---|"]
    for variable, (readers, defaults, meaning) in sorted(rows.items()):
        default = "; ".join(filter(None, (*defaults, NOTES.get(variable))))
        who = "all services" if [reader for reader in readers if reader in servers] == servers else ", ".join(readers)
        lines.append(f"| `{variable}` | {who} | {default} | {meaning} |")
    return "\n".join(lines)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check: bool = parser.parse_args().check
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    made = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if check and made != text:
        sys.exit("docs/settings.md: the table is not up to date; run `make settings`")
    if made != text:
        PAGE.write_text(made)


if __name__ == "__main__":
    main()
