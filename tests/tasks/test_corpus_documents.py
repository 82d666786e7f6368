"""Plain text: the embedded English in two parts that share nothing, and files."""

import pytest

from distill.errors import UserError
from distill.tasks.corpus import documents, python_docs


def test_parts_of_the_embedded_text_share_no_paragraph():
    train, test = (dict(python_docs(split)) for split in ("train", "test"))
    assert not train.keys() & test.keys() and len(test) >= 3
    paragraphs = [{p.strip() for text in part.values() for p in text.split("\n\n")} for part in (train, test)]
    assert not paragraphs[0] & paragraphs[1]
    assert sum(map(len, train.values())) > 200_000 and sum(map(len, test.values())) > 10_000
    assert "executed" in "".join(train.values())


def test_files_and_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert documents(str(tmp_path / "a.jsonl")) == ["one", "two"]
    with pytest.raises(UserError, match=r"prompts\.source .*nope\.txt: no such file.*python-docs"):
        documents(str(tmp_path / "nope.txt"), "train", "prompts.source")
