"""The README's figures are those of the committed run, and the files that it names are there."""

import re
import subprocess

from wmtp.confine import WEAK_TIERS
from wmtp.dependencies import ROOT

README = (ROOT / "README.md").read_text()


def committed(name: str) -> str:
    """As in the last commit: a run on another processor may have changed the working tree's."""
    return subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_table_is_that_of_the_committed_run():
    assert committed("metrics/report/table.md").split("\n\n")[1] in README


def test_the_tiers_in_which_judging_is_refused_are_named():
    said = next(line for line in README.splitlines() if "accept_weak_sandbox" in line)
    assert all(f"`{tier}`" in said for tier in WEAK_TIERS)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 10
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
