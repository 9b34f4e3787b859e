"""The README's Python blocks, which the tests run as they stand."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block(marker: str) -> str:
    """Return the only block that holds a text."""
    (code,) = (code for code in BLOCKS if marker in code)
    return code


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run a block with the names that its reader has; return all names afterwards."""
    exec(compile(code, "README.md", "exec"), names)
    return names
