"""The needle grid: texts, counting, table, picture, and the verb's errors."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import folder_bucket
import pytest

from v4jax.cli import evaluate, main, needle_grid
from v4jax.errors import NonFiniteError

DEPTHS = 4


@pytest.fixture(scope="module")
def texts():
    return needle_grid.draw_texts([1024, 4096], DEPTHS, lambda length: 3, seed=5)


def test_every_cell_gets_its_questions(texts):
    counts = {}
    for text in texts:
        for name, code, group in text.asked:
            counts[text.length, group] = counts.get((text.length, group), 0) + 1
            assert f"The code of {name} is {code}." in text.text
            place = text.text.index(f"The code of {name} is") / len(text.text)
            assert min(int(place * DEPTHS), DEPTHS - 1) == group
    assert counts == {(length, group): 3 for length in (1024, 4096) for group in range(DEPTHS)}


def test_texts_are_the_same_for_the_same_seed(texts):
    assert texts == needle_grid.draw_texts([4096, 1024], DEPTHS, lambda length: 3, seed=5)
    assert texts != needle_grid.draw_texts([4096, 1024], DEPTHS, lambda length: 3, seed=6)


class Reader:
    """Answers from the text, but only what stands in its first half."""

    options = SimpleNamespace(questions_at_once=2)
    error = ""

    def encode(self, document):
        groups = [range(i, i + 1) for i in range(len(document.questions))]
        return SimpleNamespace(document=document, groups=lambda options: groups)

    def read(self, encoded, on_chunk):
        on_chunk(len(encoded.document.text))
        return encoded.document.text

    def answer(self, encoded, state, group):
        name = encoded.document.questions[group[0]].text.split()[-1].rstrip("?")
        half = state[: len(state) // 2]
        _, _, after = half.partition(f"The code of {name} is ")
        counts = dict(answer_tokens=6, passes=2)  # the first token is read, drafts give the rest
        return [SimpleNamespace(text=after[:5] or "no idea", error=self.error, **counts)]


def test_an_answer_given_up_is_no_wrong_answer(texts):
    reader = Reader()
    reader.error = "the model computed NaN"
    with pytest.raises(NonFiniteError, match=r"in a text of 1,024 bytes, the model computed NaN"):
        needle_grid.ask_texts(reader, texts, DEPTHS, lambda *seen: None, lambda tokens: None)


def test_right_answers_are_counted_by_depth(texts, tmp_path):
    seen, tokens = [], []
    cells = needle_grid.ask_texts(
        Reader(), texts, DEPTHS, lambda text, answers: seen.extend(answers), tokens.append
    )
    for cell in cells:
        assert cell.asked == 3
        assert cell.accuracy == (1.0 if cell.depth < DEPTHS // 2 else 0.0)
        assert (cell.written, cell.passes) == (15, 6)
    assert sum(tokens) == sum(len(text.text) for text in texts)
    assert len(seen) == 2 * DEPTHS * 3 and ("no idea" in {answer for _, _, answer in seen})
    pytest.importorskip("matplotlib")
    picture = tmp_path / "grid.png"
    needle_grid.plot_cells(cells, DEPTHS, "grid", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(needle_grid, "draw_texts", lambda *arguments: pytest.fail("too late"))
    assert main.run(["evaluate", "--model=tiny", "--plot=grid.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_a_cell_without_questions_has_no_accuracy():
    assert needle_grid.Cell(1024, 0).accuracy is None
    assert dataclasses.replace(needle_grid.Cell(1024, 0), asked=4, right=1).accuracy == 0.25


@pytest.mark.parametrize("passes, said", [(6, "2.50"), (15, None), (0, None)])
def test_the_table_says_what_drafts_bring(passes, said, capsys):
    cell = needle_grid.Cell(1024, 0, asked=3, right=3, written=15, passes=passes)
    evaluate._print_table("nano", [cell if passes else dataclasses.replace(cell, written=0)], 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        ["tokens", "a", "pass", said] in lines if said else ["tokens"] not in [x[:1] for x in lines]
    )


def test_names():
    assert [needle_grid.name_length(n) for n in (4096, 1 << 20, 1000)] == ["4 K", "1 M", "1,000"]
    assert needle_grid.name_depth(4, 5) == "80–100 %"


def test_the_verb_prints_its_grid(fake_model, capsys, tmp_path, bucket):
    answers = tmp_path / "answers.jsonl"
    arguments = ["--model=tiny", "--lengths=512", "--questions=1", "--depths=1", "--json"]
    arguments += ["--mesh=data=1", "--questions_at_once=1", "--chunk_tokens=512"]
    assert main.run(["evaluate", *arguments, f"--answers={answers}"]) == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["length"], cell["asked"], cell["right"]) == (512, 1, 0)  # its answers are hashes
    [line] = answers.read_text().splitlines()
    assert json.loads(line).keys() == {"length", "name", "code", "answer"}
    arguments += [f"--answers={bucket}/a.jsonl", f"--plot={bucket}/a.png"]
    assert main.run(["evaluate", *arguments]) == 0
    assert folder_bucket.names(bucket) == ["a.jsonl", "a.png"]
    assert folder_bucket.read(f"{bucket}/a.jsonl") == answers.read_bytes()
    assert folder_bucket.read(f"{bucket}/a.png").startswith(b"\x89PNG")


BAD = {
    "no model": (["--lengths=4096"], "--model is required"),
    "no number": (["--model=tiny", "--lengths=4K"], "--lengths takes whole numbers"),
    "too short": (["--model=tiny", "--lengths=8"], "--lengths must be between 512 and"),
    "answers nowhere": (
        ["--model=tiny", "--answers=nowhere/a.jsonl"],
        "cannot write --answers=nowhere/a.jsonl; name a file in a folder that exists",
    ),
    "counts": (
        ["--model=tiny", "--lengths=512,1024,2048", "--questions=1,2"],
        "--questions takes one number, or one for each of 3 lengths, got 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    arguments, message = BAD[case]
    assert main.run(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
