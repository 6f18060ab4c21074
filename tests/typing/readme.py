"""Writes the Python programs of README.md and docs/first-steps.md into a folder, one a file, for type checkers."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in (ROOT / "README.md", ROOT / "docs" / "first-steps.md"):
        programs = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        assert programs, f"{page} has no program"
        for number, program in enumerate(programs):
            name = f"{page.stem.lower().replace('-', '_')}_{number}.py"
            (folder / name).write_text(program, encoding="utf-8")
