"""`rollahead corpus build`: from files to an automaton that drafts."""

import json
import math

import numpy as np
import pytest

from drafters.base import DraftRequest, SequenceStart, check_policy
from drafters.registry import build
from drafters.suffix.corpus import build_corpus, load_corpus
from drafters.suffix.documents import read_documents
from pipeline.cli import main
from pipeline.errors import UsageError
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.test_draft_model import with_tokenizer
from tests.unit.tiny_models import VOCABULARY, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    _write_tokenizer(folder, VOCABULARY)
    return folder


def drafts_after(corpus, prompt, budget=4):
    drafter = build({"name": "suffix-automaton", "corpora": [str(corpus)], "corpus_bias": 0, "base": 9})
    drafter.begin([SequenceStart(0, np.array(prompt), 0, 1.0, 0)])
    proposal = drafter.propose(DraftRequest([0], np.array([budget]), np.ones(1, np.float32)))
    return proposal.token_ids[0, : proposal.lengths[0]].tolist()


def test_token_ids_are_taken_as_they_are(tmp_path, capsys):
    lines = [{"token_ids": [5, 6, 7, 8]}, {"token_ids": [20, 21, 22]}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["corpus", "build", str(tmp_path / "ids.jsonl"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "7 tokens of 2 documents" in said and "corpora" in said
    assert drafts_after(tmp_path / "out", [1, 5, 6]) == [7, 8]
    assert drafts_after(tmp_path / "out", [20]) == [21, 22]
    assert drafts_after(tmp_path / "out", [8]) == []  # the next document is another text


def test_text_is_encoded_as_the_model_meets_it(tmp_path, model):
    (tmp_path / "text.jsonl").write_text(json.dumps({"question": "12", "answer": "34"}) + "\n\n")
    (tmp_path / "plain.txt").write_text("XYZ")
    arguments = [
        "corpus",
        "build",
        str(tmp_path / "text.jsonl"),
        str(tmp_path / "plain.txt"),
        "--out",
        str(tmp_path / "c"),
    ]
    assert main([*arguments, "--tokenizer", str(model), "--template", "Q{question}A{answer}"]) == 0
    tokens = [ord(c) - 31 for c in "Q12A34"]
    assert drafts_after(tmp_path / "c", tokens[:4]) == [*tokens[4:], 2]
    assert drafts_after(tmp_path / "c", [ord("X") - 31]) == [ord("Y") - 31, ord("Z") - 31, 2]


def test_a_byte_order_mark_and_unicodes_line_separators_are_part_of_no_line(tmp_path):
    lines = '{"token_ids": [5, 6, 7, 8], "a": "one\u2028two\u0085three"}\r\n{"token_ids": [9]}\n'
    (tmp_path / "f.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    documents = read_documents([tmp_path / "f.jsonl"], None, "{text}")
    assert [ids.tolist() for ids in documents] == [[5, 6, 7, 8], [9]]


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ('{"text": "ab"}\n', [], "f.jsonl:1 is text: give the model's folder with --tokenizer"),
        ("ab\n", [], "f.jsonl:1 is not a JSON object"),
        ("\n" + '{"a":' * 2000 + "1" + "}" * 2000, [], "f.jsonl:2 is not a JSON object"),
        ('{"token_ids": [1, "x"]}\n', [], "f.jsonl:1: token_ids is not a list of token ids"),
        ('{"token_ids": [1, 99999999999]}\n', [], "f.jsonl:1: token_ids is not a list of token ids"),
        ("\n", [], "the corpus has no token"),
        ('{"question": "a"}\n', ["--template", "{answer}"], "f.jsonl:1 has no field 'answer'; it has question"),
        ('{"question": "a"}\n', ["--template", "question"], "--template 'question' names no field"),
        (None, [], "f.jsonl cannot be read"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, capsys, content, more, said):
    if content is not None:
        (tmp_path / "f.jsonl").write_text(content)
    assert main(["corpus", "build", str(tmp_path / "f.jsonl"), "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_token_ids_outside_the_tokenizers_vocabulary_are_refused(tmp_path, capsys, model):
    for last, code in ((VOCABULARY - 1, 0), (VOCABULARY, 2)):
        (tmp_path / "f.jsonl").write_text(f'{{"token_ids": [1, {last}]}}\n')
        arguments = ["corpus", "build", str(tmp_path / "f.jsonl"), "--tokenizer", str(model)]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    said = f"f.jsonl:1 has token id {VOCABULARY}, outside the tokenizer's vocabulary of {VOCABULARY}; give the"
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("file", ["states.npy", "slots.npy", "corpus.json"])
def test_a_corpus_with_an_empty_file_is_refused_with_the_remedy(tmp_path, file):
    build_corpus([np.arange(9)], tmp_path)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UsageError, match=r"is not a corpus .*; build it again"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("tokens", [1e30, math.inf, math.nan, 10**40])
def test_a_corpus_of_impossible_size_is_refused_with_the_remedy(tmp_path, tokens):
    build_corpus([np.arange(9)], tmp_path)
    description = json.loads((tmp_path / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(description | {"tokens": tokens}))
    with pytest.raises(UsageError, match=r"is not a corpus .*; build it again"):
        load_corpus(tmp_path)


def test_a_negative_token_is_refused(tmp_path, capsys):
    (tmp_path / "f.jsonl").write_text('{"token_ids": [1, -4]}\n')
    assert main(["corpus", "build", str(tmp_path / "f.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "token_ids" in capsys.readouterr().err


def test_a_corpus_is_mapped_not_read_and_what_uses_it_does_not_change_it(tmp_path):
    documents = [np.random.default_rng(i).integers(0, 50, 200) for i in range(50)]
    size = build_corpus(documents, tmp_path)
    before = (tmp_path / "states.npy").read_bytes()
    corpus = load_corpus(tmp_path)
    assert isinstance(corpus.states.base, np.memmap) or isinstance(corpus.states.base.base, np.memmap)
    assert size.tokens == 10_000 and size.documents == 50
    assert drafts_after(tmp_path, documents[7][:20].tolist()) == documents[7][20:24].tolist()
    assert (tmp_path / "states.npy").read_bytes() == before


def test_a_corpus_of_another_tokenizer_is_refused_by_name(tmp_path, capsys):
    tiny = save_tiny(tmp_path / "tiny")
    policy, other = (with_tokenizer(tiny, tmp_path / words, words) for words in ("policy", "other"))
    (tmp_path / "f.txt").write_text("p o l i c y")
    for folder in (policy, other):
        assert (
            main(["corpus", "build", str(tmp_path / "f.txt"), "--tokenizer", str(folder), "--out", f"{folder}-c"]) == 0
        )
    fits, differs = (build({"name": "suffix-automaton", "corpora": [f"{folder}-c"]}) for folder in (policy, other))
    check_policy(fits, policy, False)
    with pytest.raises(UsageError, match=r"corpus .*other-c was built with another tokenizer"):
        check_policy(differs, policy, False)
    drafter = f'{{name = "suffix-automaton", corpora = ["{other}-c"]}}'
    assert main(["generate", str(policy), "--prompt", "p o", "--drafter", drafter, "--max-new-tokens", "4"]) == 2
    assert "other-c was built with another tokenizer" in capsys.readouterr().err
