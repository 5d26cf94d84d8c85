"""CITATION.cff is what tools that read it expect: valid YAML with the keys that version 1.2.0 of the format requires."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_citation_file_is_valid_and_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    paper = cited["preferred-citation"]
    for entry, required in ((cited, {"message", "title", "authors"}), (paper, {"type", "title", "authors"})):
        assert required <= set(entry)
        assert all(author.get("name") or author["family-names"] for author in entry["authors"])
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version is not None and cited["version"] == version[1]
    assert (cited["type"], cited["license"]) == ("software", "MIT")


def test_it_asks_for_the_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["preferred-citation"]
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert names == ["Weilong Dong", "Xinwei Wu", "Renren Jin", "Shaoyang Xu", "Deyi Xiong"]
    assert paper["title"] == "ConTrans: Weak-to-Strong Alignment Engineering via Concept Transplantation"
    assert (paper["type"], paper["year"], paper["conference"]["name"]) == ("conference-paper", 2025, "COLING 2025")
    assert [identifier["value"] for identifier in paper["identifiers"]] == ["arXiv:2405.13578"]
