"""Text between markers in a Markdown file, written by a script: `<!-- NAME: begin -->` to `<!-- NAME: end -->`."""

import sys
from pathlib import Path


def update(path: Path, name: str, text: str, *, check: bool) -> int:
    """Put the text between a file's markers, or, with `check`, only say whether it is there already.

    Returns:
        An exit code: 1 where `check` finds something else.
    """
    begin, end = f"<!-- {name}: begin", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        sys.exit(f"{path.name} has not just one pair of the markers {begin} ... --> and {end}")
    before, rest = old.split(begin)
    remark, rest = rest.split("-->", 1)
    new = f"{before}{begin}{remark}-->\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"
    if check and new != old:
        print(f"{path.name}: {name} is out of date; run python {Path(sys.argv[0])}", file=sys.stderr)
        return 1
    if not check:
        path.write_text(new, encoding="utf-8")
    return 0
