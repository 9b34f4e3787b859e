"""Write docs/objectives.md from the docstrings; with --check only say whether it is current."""

import argparse
import sys
from pathlib import Path

from routing_replay.objectives.documentation import markdown

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if not current")
    arguments = parser.parse_args()
    text = markdown()
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is not current. Run: python tools/generate_objectives_doc.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
