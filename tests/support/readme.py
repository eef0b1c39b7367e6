"""The blocks of README.md, as a reader copies them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The text of each fenced block in this language, in their order."""
    return re.findall(rf"^```{language}\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)


def modules(text: str = README) -> dict[str, str]:
    """The Python blocks by the file's name, which is the comment in their first line."""
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks("python", text)}


def commands(script: str) -> Iterator[list[str]]:
    """The commands of a shell block, in words; comments are left out."""
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def table(heading: str) -> list[str]:
    """What the first column of the table below a heading says in code, cell by cell."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", section.replace("\\|", ""), re.MULTILINE)
    return [code for cell in cells for code in re.findall("`(.+?)`", cell)]
