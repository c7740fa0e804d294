"""Which tokens the model sees: from every kind of source, drawn by seed, and refused where they cannot be right."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import fsspec
import pyarrow
import pytest
import torch
from pyarrow import parquet

from srr_dist.checkpoint.documents import PIECE_BYTES, read_documents
from srr_dist.checkpoint.tokens import calibration_tokens, evaluation_tokens
from srr_dist.errors import CalibrationError
from tests.families import TEXT, VOCAB_SIZE, tokenizer

LINES = TEXT.splitlines(keepends=True)
IDS = list(range(3, 103))


def evaluate(source: Path | str, *, samples: int = 2, length: int = 10, bos: bool = False) -> list[list[int]]:
    tokens = evaluation_tokens(str(source), tokenizer(bos), num_samples=samples, seq_len=length, vocab_size=VOCAB_SIZE)
    assert tokens.ids.dtype == torch.int64
    return tokens.ids.tolist()


def encode(text: str) -> list[int]:
    return tokenizer(False)(text)["input_ids"]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    """100 token ids, 3 to 102."""
    return write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": IDS[:50]}, {"input_ids": IDS[50:]}])


def test_evaluation_takes_the_first_windows_in_order(ids_file: Path) -> None:
    assert evaluate(ids_file, samples=3, length=30) == [IDS[:30], IDS[30:60], IDS[60:90]]


def test_window_starts_with_bos_where_the_tokenizer_prepends_it(ids_file: Path) -> None:
    assert evaluate(ids_file, length=11, bos=True) == [[0, *IDS[:10]], [0, *IDS[10:20]]]


def test_row_that_brings_its_own_bos_gets_no_second_one(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [0, *IDS[:10]]}, {"input_ids": [0, *IDS[10:20]]}])
    assert evaluate(file, length=11, bos=True) == [[0, *IDS[:10]], [0, *IDS[10:20]]]


def test_documents_are_joined_without_separators(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": line, "other": 1} for line in LINES])
    expected = [token for line in LINES for token in encode(line)]
    assert list(chain.from_iterable(evaluate(file))) == expected[:20]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder", "url"])
def test_every_kind_of_source_gives_the_same_windows(tmp_path: Path, kind: str) -> None:
    text, table = "".join(LINES), pyarrow.table({"id": [1], "text": ["".join(LINES)]})
    source = str(tmp_path / f"text.{kind}")
    if kind == "txt":
        Path(source).write_text(text)
    elif kind == "jsonl":
        write_jsonl(Path(source), [{"text": text}])
    elif kind == "parquet":
        parquet.write_table(table, source)
    elif kind == "folder":
        Path(source).mkdir()
        (Path(source) / "b.txt").write_text("".join(LINES[1:]))
        (Path(source) / "a.txt").write_text(LINES[0])
        (Path(source) / "README.md").write_text("not a source")
    else:
        source = "memory://texts/text.txt"
        fsspec.filesystem("memory").pipe_file("/texts/text.txt", text.encode())
    assert list(chain.from_iterable(evaluate(source))) == encode(text)[:20]


def test_parquet_with_token_ids_is_taken_as_it_is(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"input_ids": [IDS[:50], IDS[50:]]}), tmp_path / "ids.parquet")
    assert evaluate(tmp_path / "ids.parquet", samples=3, length=30) == [IDS[:30], IDS[30:60], IDS[60:90]]


def test_calibration_draws_distinct_windows_of_the_first_four_times_as_many(ids_file: Path) -> None:
    windows = [IDS[start : start + 5] for start in range(0, 100, 5)]  # 20 in all, 12 in the pool of 3
    drawn = []
    for seed in range(20):
        tokens = calibration_tokens(
            str(ids_file), tokenizer(False), num_samples=3, seq_len=5, seed=seed, vocab_size=VOCAB_SIZE
        )
        chosen = [windows.index(window) for window in tokens.ids.tolist()]
        assert len(set(chosen)) == 3 and max(chosen) < 12
        drawn += chosen
    assert set(drawn) == set(range(12))


def test_calibration_of_one_seed_is_one_digest_and_of_another_seed_another(ids_file: Path, tmp_path: Path) -> None:
    def draw(source: Path, seed: int) -> str:
        return calibration_tokens(
            str(source), tokenizer(False), num_samples=3, seq_len=5, seed=seed, vocab_size=VOCAB_SIZE
        ).sha256

    copy = write_jsonl(tmp_path / "copy.jsonl", [{"input_ids": IDS}])
    assert draw(ids_file, 1) == draw(copy, 1)
    assert draw(ids_file, 1) != draw(ids_file, 2)


def test_digest_is_stable() -> None:
    fsspec.filesystem("memory").pipe_file("/texts/ids.jsonl", b'{"input_ids": [3, 4, 5, 6]}\n')
    tokens = evaluation_tokens(
        "memory://texts/ids.jsonl", tokenizer(False), num_samples=2, seq_len=2, vocab_size=VOCAB_SIZE
    )
    assert tokens.sha256 == "650e72037f699c045deeeea76f340fda611be2dcce63718157da88ce1f2161a6"


def test_no_more_is_read_than_the_windows_need(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": IDS}, {"neither": "field"}])
    assert evaluate(file, samples=10, length=10)[9] == IDS[90:]


def test_long_text_comes_in_pieces_that_end_at_line_ends(tmp_path: Path) -> None:
    text = TEXT * 400
    (tmp_path / "long.txt").write_text(text)
    pieces = [document.content for document in read_documents(str(tmp_path / "long.txt"))]
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert all(piece.endswith("\n") and PIECE_BYTES <= len(piece) < PIECE_BYTES + 200 for piece in pieces[:-1])


def refused(source: Path | str, message: str, **kwargs: int) -> None:
    with pytest.raises(CalibrationError, match=message):
        evaluate(source, **kwargs)


def test_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", r"none\.txt: cannot be found \(FileNotFoundError")


def test_unknown_extension_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.doc").write_text(TEXT)
    refused(tmp_path / "text.doc", r"its name does not end in one of \.txt, \.jsonl, \.parquet")
    refused(tmp_path, r"none of its 1 files ends in one of \.txt, \.jsonl, \.parquet")


def test_bytes_that_are_not_utf8_are_refused_with_their_offset(tmp_path: Path) -> None:
    prefix = (TEXT * 400).encode()
    (tmp_path / "latin.txt").write_bytes(prefix + "é".encode("latin-1") + b"\n")
    refused(tmp_path / "latin.txt", rf"latin\.txt: byte {len(prefix)} is not UTF-8", samples=100_000)


def test_row_that_is_not_json_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    refused(tmp_path / "rows.jsonl", r"rows\.jsonl, line 3: not valid JSON")


@pytest.mark.parametrize("row", [{"body": "a"}, {"text": 3}, {"input_ids": [1.5]}, {"input_ids": [True]}, ["text"]])
def test_row_without_a_field_is_refused_with_its_line(tmp_path: Path, row: object) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, row])
    refused(file, r"rows\.jsonl, line 2: expected a string field 'text' or a list of integers 'input_ids'")


def test_parquet_without_a_column_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "rows.parquet")
    refused(tmp_path / "rows.parquet", r"has columns \['body'\], expected one of")


def test_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text(TEXT)
    refused(tmp_path / "rows.parquet", "not a readable parquet file")


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_id_outside_the_vocabulary_is_refused_with_its_line(tmp_path: Path, token: int) -> None:
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5]}, {"input_ids": [5, token]}])
    refused(file, rf"ids\.jsonl, line 2: token id {token} is outside 0\.\.{VOCAB_SIZE - 1}")


def test_too_little_text_is_refused_with_both_counts(ids_file: Path) -> None:
    refused(ids_file, r"100 tokens found, 110 needed for 11 windows of 10", samples=11)
    refused(ids_file, r"100 tokens found, 108 needed for 12 windows of 10", samples=12, bos=True)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    refused(tmp_path / "empty.txt", "0 tokens found, 20 needed")


def test_window_without_room_for_text_is_refused(ids_file: Path) -> None:
    refused(ids_file, r"2 windows of 1 tokens \(1 of them BOS\) hold no text", length=1, bos=True)


def rows_folder(folder: Path) -> str:
    """A folder of rows as the `datasets` library takes it for a dataset."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"body": TEXT, "number": 3} for _ in range(40)])
    return str(folder)


def test_column_of_a_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    found = list(read_documents(f"{rows_folder(tmp_path / 'rows')}::train:body"))
    assert [document.content for document in found] == [TEXT] * 40
    assert found[2].origin.endswith("row 3, column body")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("::test:body", r"after 0 rows \(ValueError: .*test"),
        (":none:train:body", r"after 0 rows \(ValueError: .*none"),
        ("::train:text", r"row 1, column text: expected a string field"),
        ("::train:number", r"row 1, column number: expected a string field"),
        ("-gone::train:body", r"cannot be read as a datasets id path:config:split:column, after 0 rows"),
    ],
)
def test_datasets_id_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = rows_folder(tmp_path / "rows") + rest
    with pytest.raises(CalibrationError, match=message) as caught:
        list(read_documents(source))
    assert str(caught.value).startswith(source) and "\n" not in str(caught.value)


def test_datasets_id_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("wikitext:wikitext-2-raw-v1:train:text", r"pip install 'srr_dist\[data\]'")
