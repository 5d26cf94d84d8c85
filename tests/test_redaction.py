"""What leaves this machine names no path of it and holds no token; all else stays as it is."""

from pathlib import Path

import pytest

from contrans_tl.redaction import redacted

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/anna/corpus.txt", "corpus.txt"),
        ("/home/anna", "~"),
        ("//home/anna/corpus.txt", "corpus.txt"),
        ("/home/anna/", "~"),
        ("/Users/Anna/Library/My Pairs.json", "My Pairs.json"),
        ("/export/home/anna", "~"),
        ("~/pairs.json", "pairs.json"),
        ("~anna/pairs.json", "pairs.json"),
        ("file:///home/anna/pairs.json", "pairs.json"),
        ("../anna/pairs.json", "pairs.json"),
        ("sftp://anna@host/home/anna/pairs.json", "pairs.json"),
        ("anna@host:/home/anna/pairs.json", "pairs.json"),
        ("copied from anna@host:~/pairs.json", "copied from pairs.json"),
        ("https://anna@example.org/pairs", "https://example.org/pairs"),
        ("./pairs.json", "pairs.json"),
        ("data/pair/source", "source"),
        ("C:\\Users\\Anna Smith\\pairs.json", "pairs.json"),
        ("C:\\Users\\Anna", "~"),
        ("C:/Users/anna/pairs.json", "pairs.json"),
        ("\\\\server\\anna\\pairs.json", "pairs.json"),
        ("read from /home/anna/pairs.json, line 3", "read from pairs.json, line 3"),
        ("in '/home/anna/a b.json'", "in 'a b.json'"),
        ("path:/home/anna/x.json", "path:x.json"),
        ('{"path": "/home/anna/x.json"}', '{"path": "x.json"}'),
        ("of C:\\Users\\Anna Smith\\x.json, and so on", "of x.json, and so on"),
        ("first\n/home/anna/x.json\nlast", "first\nx.json\nlast"),
        (str(Path.home()), "~"),
        (f"{Path.home()}/x.json", "x.json"),
        ("/home/anna: permission denied", "~"),
    ],
)
def test_a_path_is_cut_to_its_last_part(text, left):
    assert redacted(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "EleutherAI/pythia-160m",
        "https://huggingface.co/EleutherAI/pythia-160m/tree/main",
        "2 * anger + fear",
        "happiness and/or joy",
        "nats / token, 3/4 of them",
        "blocks.3.hook_resid_post",
        "naïve “joy”: a ~ b ...",
        "hf_hub_download",
        "<b>bold</b> and <br/>",
        "",
    ],
)
def test_what_is_no_path_stays(text):
    assert redacted(text) == text


def test_paths_are_found_at_any_depth_in_keys_and_values_and_other_values_stay():
    value = {"/home/anna/a": [{"deep": ("~/b", 3, None, 0.5, True)}], "c": {"d": [["/tmp/x/e"]]}}
    assert redacted(value) == {"a": [{"deep": ["b", 3, None, 0.5, True]}], "c": {"d": [["e"]]}}


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        f"pulled with token={TOKEN}",
        f"https://anna:{TOKEN}@huggingface.co/anna/x",
        "https://anna:secret@example.org/x",
        "ghp_" + "a1" * 18,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_token_is_refused_wherever_it_is_and_not_repeated(text):
    for value in (text, {"note": [{"deep": text}]}, {text: 1}):
        with pytest.raises(ValueError, match="access token or a password") as caught:
            redacted(value)
        assert TOKEN[3:6] not in str(caught.value) and "secret" not in str(caught.value)
