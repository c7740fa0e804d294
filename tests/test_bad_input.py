"""Bad input on the command line: every kind ends in one line that says what is wrong with which thing, and no output.

No case reaches a cluster: the address that the runs are given answers nobody, so that a refusal that came later than it
should would be another message.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from srr_dist import evaluate, quantize, verify
from tests.commands import flags
from tests.families import build, build_gguf

NOBODY = "127.0.0.1:1"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """What a case may damage: a folder with a model, the same in shards, a GGUF file, a text and a recipe."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def gguf(self) -> Path:
        return self.folder / "model.gguf"

    def config(self, **fields: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.model / WEIGHTS)
        change(tensors)
        save_file(tensors, self.model / WEIGHTS)

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrite the header of the weights, and leave the bytes behind it as they are."""
        content = (self.model / WEIGHTS).read_bytes()
        stop = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:stop])
        change(header)
        self.raw_header(json.dumps(header).encode(), content[stop:])

    def raw_header(self, header: bytes, rest: bytes = b"", length: int | None = None) -> None:
        announced = len(header) if length is None else length
        (self.model / WEIGHTS).write_bytes(announced.to_bytes(8, "little") + header + rest)

    def index(self, change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads((self.shards / INDEX).read_text())
        change(index["weight_map"])
        (self.shards / INDEX).write_text(json.dumps(index))

    def write(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def patch(self, old: bytes, new: bytes, after: bytes = b"") -> None:
        """Replace bytes of the GGUF file at their first place behind ``after``."""
        content = self.gguf.read_bytes()
        position = content.index(old, content.index(after) + len(after))
        self.gguf.write_bytes(content[:position] + new + content[position + len(old) :])


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        name: what is wrong.
        fragments: of the one line; by house rule what, which, expected and found.
        options: of the command, over those that are right; None leaves one out. ``{}`` stands for the place's folder.
        damage: makes the input bad.
        more: arguments behind the options.
    """

    name: str
    fragments: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    damage: Callable[[Place], object] = lambda place: None
    more: tuple[str, ...] = ()


def recipe(content: str | bytes) -> dict[str, Any]:
    return {"options": {"recipe": "{}/recipe.yaml"}, "damage": lambda place: place.write("recipe.yaml", content)}


def text(name: str, content: str | bytes) -> dict[str, Any]:
    return {"options": {"calibration": "{}/" + name}, "damage": lambda place: place.write(name, content)}


def shards(change: Callable[[Place], object]) -> dict[str, Any]:
    return {"options": {"model": "{}/shards"}, "damage": change}


def gguf(change: Callable[[Place], object]) -> dict[str, Any]:
    return {"options": {"model": "{}/model.gguf"}, "damage": change}


def first_shard(place: Place) -> Path:
    return sorted(place.shards.glob("model-*"))[0]


def twice(place: Place) -> None:
    shard = first_shard(place)
    tensors = load_file(shard)
    save_file(tensors | {"lm_head.weight": load_file(place.model / WEIGHTS)["lm_head.weight"]}, shard)


def put_nan(tensors: dict[str, torch.Tensor], value: float = float("nan")) -> None:
    tensors[UP_PROJ][3, 5] = value


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


OPTIONS = [
    Case("a word for a number", ("--rank", "invalid int value: 'many'"), {"rank": "many"}),
    Case("a fraction for a whole number", ("--seed", "invalid int value: '1.5'"), {"seed": "1.5"}),
    Case("a word for a share", ("--max-bad-rows", "invalid float value: 'few'"), {"max_bad_rows": "few"}),
    Case(
        "not a number for a share", ("max_bad_rows: expected a share from 0 to 1, found nan",), {"max_bad_rows": "nan"}
    ),
    Case("a choice that is none", ("--export", "invalid choice: 'gguf'", "compressed", "dense"), {"export": "gguf"}),
    Case("an unknown flag", ("unrecognized arguments: --ranks 3",), more=("--ranks", "3")),
    Case("a flag without its value", ("--bits: expected one argument",), more=("--bits",)),
    Case("a value for a switch", ("--dry-run: ignored explicit argument 'yes'",), more=("--dry-run=yes",)),
    Case("one bit", ("bits: expected 2 to 8, found 1",), {"bits": 1}),
    Case("an empty group", ("group_size: expected a positive number or -1, found 0",), {"group_size": 0}),
    Case("an unknown split", ("split: expected search, criterion, energy or fixed:K", "'best'"), {"split": "best"}),
    Case("no samples", ("num_samples: expected at least 1, found 0",), {"num_samples": 0}),
    Case("workers below none", ("workers: expected 0 or more, found -1",), {"workers": -1}),
    Case(
        "a size in no unit", ("gpu_memory: expected a size as 8GiB or 80G, found '80 gigs'",), {"gpu_memory": "80 gigs"}
    ),
    Case("nothing to calibrate on", ("calibration: expected text to calibrate on",), {"calibration": None}),
    Case("a recipe that is not there", ("recipe: ", "none.yaml cannot be read"), {"recipe": "{}/none.yaml"}),
    Case("a folder for a recipe", ("recipe: ", "cannot be read: Is a directory"), {"recipe": "{}"}),
    Case("a recipe that is no YAML", ("recipe: ", "recipe.yaml is no YAML", "line 2"), **recipe("bits: [3\nrank: 2")),
    Case("a recipe of other bytes", ("recipe: ", "recipe.yaml is no YAML", "utf-8"), **recipe(b"bits: \xff\xfe")),
    Case("a recipe with code", ("is no YAML", "python/object"), **recipe("bits: !!python/object/apply:os.getpid []")),
    Case("a recipe with an impossible date", ("recipe.yaml is no YAML",), **recipe("include: 2001-99-99")),
    Case("a recipe nested without end", ("recipe.yaml is no YAML",), **recipe("bits: " + "[" * 1200)),
    Case("a recipe that is a list", ("must be a mapping", "found list"), **recipe("- bits: 3\n- rank: 4\n")),
    Case("a recipe that is one word", ("must be a mapping", "found str"), **recipe("fast")),
    Case(
        "a recipe whose keys are numbers",
        ("must be a mapping of option names to values, found the key 3",),
        **recipe("3: bits\n"),
    ),
    Case("a recipe with a list for a value", ("gives bits a list, expected a single value",), **recipe("bits: [3]\n")),
    Case("an unknown key in a recipe", ("ranks: no such option; known are", "rank"), **recipe("ranks: 3\n")),
    Case(
        "a text for a number in a recipe", ("bits: expected a value of type int, found '3'",), **recipe("bits: '3'\n")
    ),
    Case(
        "a truth for a number in a recipe", ("bits: expected a value of type int, found True",), **recipe("bits: yes\n")
    ),
    Case(
        "nothing for a text in a recipe", ("include: expected a value of type str, found None",), **recipe("include:\n")
    ),
]

MODELS = [
    Case("no model there", ("none: no such file or folder, and not a hub id",), {"model": "{}/none"}),
    Case("an empty folder", ("empty: no config.json",), {"model": "{}/empty"}, lambda p: (p.folder / "empty").mkdir()),
    Case(
        "a file of weights for a folder",
        ("is a file; expected a folder with config.json",),
        {"model": "{}/model/" + WEIGHTS},
    ),
    Case("a revision of a folder", ("revision 'main' given, but only hub ids have revisions",), {"revision": "main"}),
    Case("storage of an unknown kind", ("nope://bucket/model", "nope"), {"model": "nope://bucket/model"}),
    Case(
        "a configuration of no bytes",
        ("config.json: not valid JSON",),
        damage=lambda p: p.write("model/config.json", ""),
    ),
    Case(
        "a configuration of other bytes",
        ("config.json: not UTF-8 at byte 2",),
        damage=lambda p: p.write("model/config.json", b'{"\xff'),
    ),
    Case(
        "a configuration cut off",
        ("config.json: not valid JSON", "line 2"),
        damage=lambda p: truncate(p.model / "config.json", 200),
    ),
    Case(
        "a configuration nested without end",
        ("config.json: not valid JSON",),
        damage=lambda p: p.write("model/config.json", "[" * 100_000),
    ),
    Case(
        "a configuration that is a list",
        ("config.json: no model_type",),
        damage=lambda p: p.write("model/config.json", "[]"),
    ),
    Case(
        "an unknown architecture",
        ("model_type 'nobody' is unknown", "no remote code is run"),
        damage=lambda p: p.config(model_type="nobody"),
    ),
    Case(
        "an architecture of remote code",
        ("model_type 'theirs' is code that comes with the checkpoint",),
        damage=lambda p: p.config(model_type="theirs", auto_map={"AutoConfig": "evil.C"}),
    ),
    Case(
        "a width that is a word",
        ("config.json: transformers refuses it", "hidden_size"),
        damage=lambda p: p.config(hidden_size="wide"),
    ),
    Case(
        "a width that heads do not divide",
        ("config.json: transformers refuses it", "attention heads"),
        damage=lambda p: p.config(num_attention_heads=5),
    ),
    Case(
        "more blocks than fit any memory",
        ("config.json: num_hidden_layers is 1000000000, expected at most 10000",),
        damage=lambda p: p.config(num_hidden_layers=10**9),
    ),
    Case("no blocks", ("expected one list of 0 decoder blocks",), damage=lambda p: p.config(num_hidden_layers=0)),
    Case(
        "an unknown activation",
        ("transformers cannot build it", "gelu_9000"),
        damage=lambda p: p.config(hidden_act="gelu_9000"),
    ),
    Case(
        "a quantized checkpoint",
        ("already quantized", "method awq", "start from the original weights"),
        damage=lambda p: p.config(quantization_config={"quant_method": "awq"}),
    ),
    Case(
        "pickled weights alone",
        ("only pickled weights (model.bin); convert them",),
        damage=lambda p: (p.model / WEIGHTS).rename(p.model / "model.bin"),
    ),
    Case(
        "weights of no bytes",
        (f"{WEIGHTS}: 0 bytes are too few for its header",),
        damage=lambda p: p.write(f"model/{WEIGHTS}", b""),
    ),
    Case(
        "an absurd header length",
        ("bytes are too few for its header (9223372036854775815 bytes)",),
        damage=lambda p: p.raw_header(b"{}", length=2**63 - 1),
    ),
    Case("a header that is not JSON", ("header is not valid JSON",), damage=lambda p: p.raw_header(b"\x80\x05pickle")),
    Case("a header nested without end", ("header is not valid JSON",), damage=lambda p: p.raw_header(b"[" * 100_000)),
    Case(
        "a tensor that overlaps another",
        (f"tensor {UP_PROJ}", "its neighbour overlaps it"),
        damage=lambda p: p.header(lambda h: h[UP_PROJ].update(data_offsets=[4, 4 + 128 * 64 * 4])),
    ),
    Case(
        "a tensor of another dtype than its bytes",
        (f"tensor {UP_PROJ} has bytes", "for BF16 [128, 64]"),
        damage=lambda p: p.header(lambda h: h[UP_PROJ].update(dtype="BF16")),
    ),
    Case(
        "a tensor of a dtype not read",
        (f"tensor {UP_PROJ} has dtype F4, supported are",),
        damage=lambda p: p.header(lambda h: h[UP_PROJ].update(dtype="F4")),
    ),
    Case(
        "a tensor of another shape than the model's",
        (UP_PROJ, "[64, 128], the model expects"),
        damage=lambda p: p.header(lambda h: h[UP_PROJ].update(shape=[64, 128])),
    ),
    Case(
        "integers for weights",
        (UP_PROJ, "is I32 [128, 64], the model expects"),
        damage=lambda p: p.header(lambda h: h[UP_PROJ].update(dtype="I32")),
    ),
    Case("one name twice in a header", ("a name occurs twice",), damage=lambda p: p.raw_header(b'{"w": {}, "w": {}}')),
    Case(
        "weights cut off",
        (f"{WEIGHTS}: truncated: header ends at byte",),
        damage=lambda p: truncate(p.model / WEIGHTS, 7),
    ),
    Case(
        "weights with bytes behind them",
        (f"{WEIGHTS}: followed by bytes of no tensor",),
        damage=lambda p: p.write(f"model/{WEIGHTS}", (p.model / WEIGHTS).read_bytes() + b"more"),
    ),
    Case(
        "a tensor that is missing", ("lacks 1 tensors", UP_PROJ), damage=lambda p: p.tensors(lambda t: t.pop(UP_PROJ))
    ),
    Case(
        "NaN in a weight",
        (f"tensor {UP_PROJ}: 1 of 8192 values are NaN or infinite",),
        damage=lambda p: p.tensors(put_nan),
    ),
    Case(
        "infinity in a weight",
        (f"tensor {UP_PROJ}: 1 of 8192 values are NaN or infinite",),
        damage=lambda p: p.tensors(lambda t: put_nan(t, float("inf"))),
    ),
    Case(
        "no tokenizer",
        ("no usable tokenizer beside the weights",),
        damage=lambda p: [path.unlink() for path in p.model.glob("tokenizer*")],
    ),
    Case(
        "a damaged tokenizer",
        ("no usable tokenizer beside the weights",),
        damage=lambda p: p.write("model/tokenizer.json", "{"),
    ),
    Case(
        "a tokenizer with more tokens than the model",
        ("token id", "is outside 0..99", "another model"),
        {"model": "{}/small"},
        lambda p: build("llama", p.folder / "small", num_hidden_layers=1, vocab_size=100),
    ),
    Case(
        "a shard that is missing",
        ("shard model-00001", "is named by", "but missing"),
        **shards(lambda p: first_shard(p).unlink()),
    ),
    Case(
        "a shard that is a folder",
        ("shard model-00001", "but missing"),
        **shards(
            lambda p: (
                shutil.move(first_shard(p), p.folder / "away"),
                (p.shards / "model-00001-of-00005.safetensors").mkdir(),
            )
        ),
    ),
    Case(
        "a shard cut off",
        ("model-00001", "truncated: header ends at byte"),
        **shards(lambda p: truncate(first_shard(p), 1)),
    ),
    Case(
        "an index that leads out of the folder",
        ("shard ../model/model.safetensors", "but missing"),
        **shards(lambda p: p.index(lambda m: m.update({UP_PROJ: f"../model/{WEIGHTS}"}))),
    ),
    Case(
        "an index that leads to another place",
        ("shard /etc/passwd", "but missing"),
        **shards(lambda p: p.index(lambda m: m.update({UP_PROJ: "/etc/passwd"}))),
    ),
    Case(
        "an index that leads to another host",
        ("shard http://host/x.safetensors", "but missing"),
        **shards(lambda p: p.index(lambda m: m.update({UP_PROJ: "http://host/x.safetensors"}))),
    ),
    Case(
        "an index of nothing", ("lacks", "tensors that LlamaForCausalLM needs"), **shards(lambda p: p.index(dict.clear))
    ),
    Case(
        "an index that is not JSON",
        (f"{INDEX}: expected JSON with a weight_map",),
        **shards(lambda p: p.write(f"shards/{INDEX}", "{")),
    ),
    Case(
        "an index nested without end",
        (f"{INDEX}: expected JSON with a weight_map",),
        **shards(lambda p: p.write(f"shards/{INDEX}", "[" * 100_000)),
    ),
    Case("one tensor in two shards", ("tensor lm_head.weight is in model-00001", "and in model-0"), **shards(twice)),
]

GGUF = [
    Case("GGUF of other bytes", ("not a readable GGUF file", "magic"), **gguf(lambda p: p.patch(b"GGUF", b"GGML"))),
    Case("GGUF of no bytes", ("not a readable GGUF file",), **gguf(lambda p: p.write("model.gguf", b""))),
    Case(
        "GGUF of another version",
        ("not a readable GGUF file", "version 99"),
        **gguf(lambda p: p.patch(b"\x03\0\0\0", b"\x63\0\0\0", b"GGUF")),
    ),
    Case(
        "GGUF cut off in its header",
        ("not a readable GGUF file",),
        **gguf(lambda p: p.write("model.gguf", p.gguf.read_bytes()[:3000])),
    ),
    Case(
        "GGUF cut off in its tensors",
        ("not a readable GGUF file, or truncated",),
        **gguf(lambda p: truncate(p.gguf, 100)),
    ),
    Case(
        "GGUF with an absurd number of tensors",
        ("not a readable GGUF file",),
        **gguf(
            lambda p: p.write(
                "model.gguf", p.gguf.read_bytes()[:8] + struct.pack("<Q", 2**62) + p.gguf.read_bytes()[16:]
            )
        ),
    ),
    Case(
        "GGUF with an array of absurd length",
        ("not a readable GGUF file", "values"),
        **gguf(lambda p: p.patch(struct.pack("<Q", 320), struct.pack("<Q", 2**60), b"tokenizer.ggml.token_type")),
    ),
    Case(
        "GGUF of an unknown type",
        ("not a readable GGUF file", "999"),
        **gguf(
            lambda p: p.patch(
                struct.pack("<I", 8), struct.pack("<I", 999), b"blk.0.attn_q.weight" + struct.pack("<I", 2)
            )
        ),
    ),
    Case(
        "GGUF of another architecture",
        ("GGUF architecture 'clip' is not one",),
        **gguf(lambda p: build_gguf(p.gguf, architecture="clip")),
    ),
    Case(
        "GGUF without an architecture",
        ("GGUF architecture None is not one",),
        **gguf(lambda p: p.patch(b"general.architecture", b"general.arkhitecture")),
    ),
    Case(
        "GGUF with more blocks than fit any memory",
        ("llama.block_count is 4000000000, expected a number up to 10000",),
        **gguf(
            lambda p: p.patch(
                struct.pack("<I", 4), struct.pack("<I", 4 * 10**9), b"llama.block_count" + struct.pack("<I", 4)
            )
        ),
    ),
]

CALIBRATION = [
    Case("no text there", ("none.txt: cannot be found",), {"calibration": "{}/none.txt"}),
    Case("a text of no bytes", ("empty.txt: 0 tokens found, 240 needed",), **text("empty.txt", "")),
    Case(
        "too short a text",
        ("short.txt:", "tokens found, 240 needed for 8 windows of 31"),
        **text("short.txt", "a few words"),
    ),
    Case(
        "a text of other bytes",
        ("latin.txt: byte 3 is not UTF-8", "convert the file"),
        **text("latin.txt", b"caf\xe9 " * 99),
    ),
    Case(
        "a text of an unknown kind",
        ("text.pdf: its name does not end in one of .txt, .jsonl, .parquet",),
        **text("text.pdf", "%PDF"),
    ),
    Case(
        "a folder without texts",
        ("none of its 1 files ends in one of .txt",),
        {"calibration": "{}/texts"},
        lambda p: p.write("texts/a.pdf", "%PDF"),
    ),
    Case(
        "a line that is not JSON",
        ("rows.jsonl, line 2: not valid JSON",),
        **text("rows.jsonl", '{"text": "a"}\n{"text": \n'),
    ),
    Case("a line nested without end", ("rows.jsonl, line 1: not valid JSON",), **text("rows.jsonl", "[" * 100_000)),
    Case(
        "a line without text",
        ("rows.jsonl, line 1: expected a string field 'text'",),
        **text("rows.jsonl", '{"body": "a"}\n'),
    ),
    Case(
        "a line with a number for its text",
        ("rows.jsonl, line 1: expected a string field 'text'",),
        **text("rows.jsonl", '{"text": 7}\n'),
    ),
    Case(
        "an id below the vocabulary",
        ("ids.jsonl, line 1: token id -1 is outside 0..319",),
        **text("ids.jsonl", '{"input_ids": [5, -1]}\n'),
    ),
    Case(
        "an id above the vocabulary",
        ("ids.jsonl, line 1: token id 320 is outside 0..319",),
        **text("ids.jsonl", '{"input_ids": [5, 320]}\n'),
    ),
    Case(
        "an id of more bits than ids have",
        ("ids.jsonl, line 1: token id", "is outside 0..319"),
        **text("ids.jsonl", '{"input_ids": [36893488147419103232]}\n'),
    ),
    Case(
        "parquet without the column",
        ("has columns ['body'], expected one of",),
        {"calibration": "{}/rows.parquet"},
        lambda p: parquet.write_table(pyarrow.table({"body": ["a"]}), p.folder / "rows.parquet"),
    ),
    Case(
        "parquet of other bytes",
        ("rows.parquet: not a readable parquet file",),
        **text("rows.parquet", b"PAR1" + bytes(99)),
    ),
    Case(
        "storage of an unknown kind",
        ("nope://bucket/text.txt: cannot be found",),
        {"calibration": "nope://bucket/text.txt"},
    ),
    Case(
        "sequences beyond the model's positions",
        ("seq_len: 257 tokens, but the model has 256 positions",),
        {"seq_len": 257},
    ),
]

OUTPUTS = [
    Case("no output", ("output: expected a location (--output)",), {"output": None}),
    Case("a file for an output", ("words.txt: a file, expected a folder",), {"output": "{}/words.txt"}),
    Case(
        "storage of an unknown kind", ("nope://bucket/out: no such kind of storage",), {"output": "nope://bucket/out"}
    ),
    Case("storage without a bucket", ("s3:///out: no such kind of storage",), {"output": "s3:///out"}),
    Case(
        "a cache before the storage", ("no such kind of storage", "cache"), {"output": "simplecache::s3://bucket/out"}
    ),
    Case(
        "the model's own folder", ("model: is the model's own folder; name another --output",), {"output": "{}/model"}
    ),
]

CLUSTERS = [
    Case("nobody at the address", ("ray_address: no Ray cluster answers at '127.0.0.1:1'",)),
    Case(
        "no client server at the address",
        ("ray_address: no Ray cluster answers at 'ray://127.0.0.1:1'",),
        {"ray_address": "ray://127.0.0.1:1"},
    ),
    Case(
        "a port that is none",
        ("ray_address: no Ray cluster answers at '127.0.0.1:99999'",),
        {"ray_address": "127.0.0.1:99999"},
    ),
    Case(
        "an address that is none",
        ("ray_address: no Ray cluster answers at 'nonsense'", "Invalid address"),
        {"ray_address": "nonsense"},
    ),
]

CASES = OPTIONS + MODELS + GGUF + CALIBRATION + OUTPUTS + CLUSTERS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """What is right; not to be changed."""
    place = Place(tmp_path_factory.mktemp("right"))
    build("llama", place.model, num_hidden_layers=2)
    build("llama", place.shards, num_hidden_layers=2, max_shard_size="150KB")
    build_gguf(place.gguf)
    place.write("words.txt", "The river rises in the hills above the town and runs south. " * 200)
    return place


@pytest.fixture
def place(prepared: Place, tmp_path: Path) -> Place:
    return Place(shutil.copytree(prepared.folder, tmp_path / "input"))


def arguments(place: Place, case: Case) -> list[str]:
    options = {
        "model": "{}/model",
        "calibration": "{}/words.txt",
        "output": "{}/out",
        "num_samples": 8,
        "seq_len": 31,
        "rank": 4,
        "ray_address": NOBODY,
        **case.options,
    }
    filled = {name: str(value).replace("{}", str(place.folder)) for name, value in options.items() if value is not None}
    return [*flags(**filled), *case.more]


def exit_code(verb: Callable[[list[str]], int], given: list[str]) -> int:
    """Of a verb; argparse leaves by itself."""
    try:
        return verb(given)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_in_one_line_and_without_output(case, place, capfd):
    case.damage(place)
    before = set(place.folder.rglob("*"))
    assert exit_code(quantize.main, arguments(place, case)) == 2
    shown = capfd.readouterr().err
    complaints = [line for line in shown.splitlines() if line.startswith("srr-dist: ") or ": error: " in line]
    assert len(complaints) == 1, shown
    for fragment in case.fragments:
        assert fragment in complaints[0]
    assert "Traceback" not in shown
    assert set(place.folder.rglob("*")) == before
    assert exit_code(verify.main, [str(place.folder / "out")]) == 1


def test_kinds_of_bad_input_are_told_apart_and_many():
    assert len({(case.name, str(case.options)) for case in CASES}) == len(CASES) >= 60


EVALUATIONS = [
    Case("no text", ("--text", "required"), {"text": None}),
    Case("no output there", ("none: no COMMIT", "not a finished output"), {"quantized": "{}/none"}),
    Case("a file for an output", ("words.txt: a file, expected a folder",), {"quantized": "{}/words.txt"}),
    Case("no samples", ("num_samples: expected at least 1, found 0",), {"num_samples": 0}),
]
"""What needs a finished output to be refused is tested in tests/pipeline."""


@pytest.mark.parametrize("case", EVALUATIONS, ids=lambda case: case.name)
def test_bad_input_of_evaluate_ends_in_one_line(case, place, capfd):
    options = {"model": "{}/model", "quantized": "{}/none", "text": "{}/words.txt", "seq_len": 31, **case.options}
    filled = {name: str(value).replace("{}", str(place.folder)) for name, value in options.items() if value is not None}
    assert exit_code(evaluate.main, flags(**filled)) == 2
    shown = capfd.readouterr().err
    for fragment in case.fragments:
        assert fragment in shown.splitlines()[-1]
    assert "Traceback" not in shown
