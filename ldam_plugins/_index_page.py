"""``README.md`` as a package index shows it, where the files that it links to are not.

Used by setuptools alone, when it writes the metadata of a distribution.
"""

from __future__ import annotations

import re

from setuptools.command.egg_info import egg_info

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:)([^)#]*)(?:#[^)]*)?\)")


def index_page(readme: str) -> str:
    r"""Markdown without the pictures and links that only work beside the files of the repository.

    A picture is left out; of a link the text stays, and the file by its name.

    Example:
        >>> index_page("![A page](page.png)\n\nSee [the table](results/README.md#digits).")
        'See the table (`results/README.md`).'
    """
    parts = _FENCED.split(readme)
    return "".join(part if part.startswith("```") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    return _LINK.sub(_named, _PICTURE.sub("", text))


def _named(link: re.Match[str]) -> str:
    text, file = link.groups()
    return text if not file or text.strip("`") == file else f"{text} (`{file}`)"


class EggInfo(egg_info):
    """``egg_info`` of setuptools, with the page of the index as long description."""

    def finalize_options(self) -> None:
        """Replace the description before anything writes it."""
        metadata = self.distribution.metadata
        metadata.long_description = index_page(metadata.long_description)
        super().finalize_options()
