"""Make the links of README.md absolute, for PyPI:  python scripts/readme_links.py https://HOST/OWNER/NAME/blob/TAG

The release does this before it builds; in the repository they are relative, so that they fit each branch and each copy.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def absolute(text: str, base: str) -> str:
    """The text with ``base`` before every relative link; pictures are linked as they are stored."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        return f"{mark}[{words}]({base.rstrip('/')}/{target}{'?raw=true' if mark else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)", link, text)


if __name__ == "__main__":
    README.write_text(absolute(README.read_text(encoding="utf-8"), sys.argv[1]), encoding="utf-8")
