"""Write the table of RPCs and roles into docs/security.md, from `paramesh.access.TABLE`.

python tools/gen_role_docs.py            # rewrite the table
python tools/gen_role_docs.py --check    # exit 1 if it is not current
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections import defaultdict

from paramesh.access import HEALTH, TABLE
from paramesh.identity import Role

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- roles: begin -->", "<!-- roles: end -->"


def table() -> str:
    """The table as Markdown: a row per service and set of roles."""
    lines = [f"| service | calls | {' | '.join(Role)} |", "| --- | --- |" + " --- |" * len(Role)]
    for service, methods in TABLE.items():
        by_roles = defaultdict(list)
        for method, roles in methods.items():
            by_roles[roles].append(method)
        for roles, names in by_roles.items():
            note = " (with tokens: anybody)" if f"/{service}/{names[0]}" in HEALTH else ""
            cells = " | ".join("yes" if role in roles else "" for role in Role)
            lines.append(f"| `{service.rpartition('.')[2]}` | {', '.join(names)}{note} | {cells} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the table of now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{PAGE.name} is not current: run python tools/gen_role_docs.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
