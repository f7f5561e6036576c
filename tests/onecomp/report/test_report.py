import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from onecomp.errors import InputError
from onecomp.report import write_report
from onecomp.report.figures import block_error_line, error_heat_map
from onecomp.report.journal import LayerRecord, read_journal
from onecomp.report.report import DASH, worst_layers

KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
RUN = {
    "model": {"id": "some-org/tiny<b>llama</b>", "content_hash": "0123abcd"},
    "quantizer": {"name": "GPTQ", "wbits": 4, "actorder": True, "exclude_layer_names": ["lm_head"]},
    "calibration": {"dataset": "c4", "num_samples": 128, "hash": "fedc9876"},
    "versions": {"torch": "2.13.0"},
    "executor": "LocalExecutor",
    "created": "2025-01-02T03:04:05Z",
}


def error_of(block: int, kind: int) -> float:
    return 1e-4 * (block + 1) * 3**kind


def group_event(block: int, **changes: object) -> dict:
    layers = {
        f"model.layers.{block}.{kind}": {
            "relative_output_squared_error": error_of(block, i),
            "relative_weight_squared_error": 2e-3,
            "bits": 4.25,
        }
        for i, kind in enumerate(KINDS)
    }
    event = {"event": "group", "block": block, "layers": layers, "seconds": 1.5, "fallbacks": []}
    return event | changes


def block_event(block: int, **changes: object) -> dict:
    error = sum(error_of(block, i) for i in range(len(KINDS))) / len(KINDS)
    event = {"event": "block", "block": block, "seconds": 4.0 + block, "output_error": error}
    return event | {"bytes_moved": 3 * 2**20} | changes


def evaluation_event(what: str, perplexity: float) -> dict:
    return {
        "event": "evaluation",
        "what": what,
        "perplexity": perplexity,
        "text": "wikitext2",
        "tokens": 12345,
    }


def whole_run(num_blocks: int = 3) -> list[dict]:
    events = [event for b in range(num_blocks) for event in (group_event(b), block_event(b))]
    evaluations = [evaluation_event("original", 8.0), evaluation_event("quantized", 8.2)]
    return [*events, *evaluations, {"event": "finished", "seconds": 3900.0}]


def write_run(run_dir, events: list[dict], run: object = RUN, tail: bytes = b""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(run))
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run_dir / "events.jsonl").write_bytes(lines.encode() + tail)
    return run_dir


class Text(HTMLParser):
    """Text of a page, one space between elements."""

    def __init__(self, page: str):
        super().__init__()
        self.parts: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.parts.append(data.strip())

    def __str__(self) -> str:
        return " ".join(part for part in self.parts if part)


@pytest.fixture(scope="module")
def finished_page(tmp_path_factory) -> str:
    run_dir = write_run(tmp_path_factory.mktemp("run"), whole_run(4))
    return write_report(run_dir).read_text(encoding="utf-8")


def report_text(run_dir) -> str:
    return str(Text(write_report(run_dir).read_text(encoding="utf-8")))


def test_a_finished_run_is_told_in_full(finished_page):
    text = str(Text(finished_page))
    for expected in [
        "finished · run created 2025-01-02T03:04:05Z",
        "quantizer GPTQ",
        "bits per weight 4.25",
        "perplexity 8.00 → 8.20 +2.5 %",
        "time 1h5m",
        "original wikitext2 8.000 12,345",
        "quantized wikitext2 8.200 12,345",
        "quantizer.actorder yes",
        "quantizer.exclude_layer_names lm_head",
        "Fallbacks None.",
        "finished blocks 4",
        "slowest block 3 (7.0 s)",
        "quantizing, sum over input groups 6s",
        "bytes moved 12.0 MiB",
    ]:
        assert expected in text


def test_hashes_stand_apart_from_settings(finished_page):
    hashes, settings = str(Text(finished_page)).split("Hashes")[1].split("Settings")
    assert "model.content_hash 0123abcd" in hashes
    assert "calibration.hash fedc9876" in hashes
    assert "0123abcd" not in settings
    assert "calibration.num_samples 128" in settings


def test_the_ten_worst_layers_are_named_worst_first(finished_page):
    named = re.findall(r'class="mono">(model\.layers[^<]*)<', finished_page)
    errors = {
        f"model.layers.{b}.{k}": error_of(b, i) for b in range(4) for i, k in enumerate(KINDS)
    }
    assert named == sorted(errors, key=errors.__getitem__, reverse=True)[:10]


def test_an_error_that_is_not_a_number_is_worst():
    layers = [
        LayerRecord(layer_name=name, block=0, output_error=error, weight_error=None, bits=None)
        for name, error in [("a", 1.0), ("b", math.nan), ("c", None), ("d", 2.0)]
    ]
    assert [layer.layer_name for layer in worst_layers(layers)] == ["b", "d", "a"]


def test_the_page_needs_nothing_but_itself(finished_page):
    assert not re.search(r"<(script|link|img|iframe)\b|@import|src=", finished_page)
    for reference in re.findall(r'(?:href="|url\()([^")]*)', finished_page):
        assert reference.startswith(("#", "data:"))


def test_identifiers_are_unique_and_references_resolve(finished_page):
    identifiers = re.findall(r'\bid="([^"]*)"', finished_page)
    assert len(identifiers) == len(set(identifiers)) > 0
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', finished_page)) <= set(identifiers)


def test_text_of_the_run_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    events = [group_event(0, fallbacks=[hostile]), evaluation_event(hostile, 1.0)]
    page = write_report(write_run(tmp_path / "run", events)).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>llama" not in page
    assert "&lt;script&gt;" in page


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run_dir = write_run(tmp_path / "run", whole_run())
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir, tmp_path / "second.html").read_bytes() == first


def test_fallbacks_are_listed_with_their_block(tmp_path):
    fallbacks = ["damping raised to 0.1", {"layer": "model.layers.1.mlp.up_proj", "rung": "fp64"}]
    text = report_text(write_run(tmp_path / "run", [group_event(1, fallbacks=fallbacks)]))
    assert "1 damping raised to 0.1" in text
    assert "1 layer: model.layers.1.mlp.up_proj, rung: fp64" in text
    assert "fallbacks 2" in text


def test_a_killed_run_is_reported_up_to_its_last_whole_line(tmp_path):
    events = whole_run()[:4]
    cut = json.dumps(group_event(2)).encode()[:-7]
    run_dir = write_run(tmp_path / "run", events, tail=cut)
    text = report_text(run_dir)
    assert "not finished" in text
    assert "finished blocks 2" in text
    assert "unreadable" not in text
    assert {layer.block for layer in read_journal(run_dir).layers} == {0, 1}


def test_a_cut_inside_a_character_is_no_obstacle(tmp_path):
    cut = '{"event": "evaluation", "text": "é'.encode()[:-1]
    assert "not finished" in report_text(write_run(tmp_path / "run", whole_run()[:2], tail=cut))


def test_unreadable_lines_in_the_middle_are_counted(tmp_path):
    tail = b'{"event": "gr{"event": "block"}\n' + json.dumps(block_event(1)).encode() + b"\n"
    text = report_text(write_run(tmp_path / "run", whole_run()[:2], tail=tail))
    assert "1 unreadable line(s) of the journal" in text
    assert "finished blocks 2" in text


def test_a_repeated_unit_counts_once_as_it_was_last(tmp_path):
    first = group_event(0, fallbacks=["old"], seconds=100.0)
    again = group_event(0, fallbacks=["new"])
    again["layers"] = {name: {"bits": 3.0} for name in again["layers"]}
    journal = read_journal(write_run(tmp_path / "run", [first, again]))
    assert [fallback.text for fallback in journal.fallbacks] == ["new"]
    assert [layer.bits for layer in journal.layers] == [3.0] * len(KINDS)
    assert journal.group_s == 1.5


def test_missing_keys_show_as_dashes_and_unknown_events_are_ignored(tmp_path):
    events = [
        {"event": "group"},
        {"event": "group", "block": 0, "layers": {"model.layers.0.mlp.up_proj": {}}},
        {"event": "block", "block": 0},
        {"event": "block"},
        {"event": "evaluation"},
        {"event": "somebody_joined", "worker": 3},
        {"no": "event"},
        {"event": "finished"},
    ]
    text = report_text(write_run(tmp_path / "run", events, run={}))
    assert f"quantizer {DASH}" in text
    assert f"perplexity {DASH}" in text
    assert f"time {DASH}" in text
    assert "No layer's output error was recorded." in text
    assert "No block's output error was recorded." in text


@pytest.mark.parametrize("with_file", [False, True])
def test_a_run_without_events_has_a_report(tmp_path, with_file):
    run_dir = write_run(tmp_path / "run", [])
    if not with_file:
        (run_dir / "events.jsonl").unlink()
    assert "not finished" in report_text(run_dir)


def test_no_half_written_file_is_left(tmp_path):
    run_dir = write_run(tmp_path / "run", whole_run())
    assert write_report(run_dir) == run_dir / "report.html"
    assert write_report(run_dir, tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "events.jsonl",
        "report.html",
        "run.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.html", "run"]


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no run\.json, so it is not a run directory"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        write_report(tmp_path)


def layer(name: str, block: int, error: float | None) -> LayerRecord:
    return LayerRecord(
        layer_name=name, block=block, output_error=error, weight_error=None, bits=None
    )


def test_experts_share_a_kind():
    assert layer("model.layers.3.mlp.experts.17.gate_proj", 3, 0.1).kind == "mlp.experts.gate_proj"
    assert layer("model.layers.3.mlp.down_proj", 3, 0.1).kind == "mlp.down_proj"
    assert layer("lm_head", 0, 0.1).kind == "lm_head"


def test_the_heat_map_labels_each_kind_of_layer_once():
    layers = [layer(f"model.layers.{b}.{k}", b, 0.1) for b in range(3) for k in KINDS]
    svg = error_heat_map(layers)
    assert svg is not None
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert [svg.count(f">{kind}<") for kind in KINDS] == [1] * len(KINDS)


@pytest.mark.parametrize("error", [0.0, None, math.nan, math.inf])
def test_what_has_no_logarithm_is_not_drawn(error):
    assert error_heat_map([layer("model.layers.0.mlp.up_proj", 0, error)]) is None
    assert error_heat_map([layer("model.layers.0.a", 0, error), layer("model.layers.0.b", 0, 0.1)])
    if error is not None:
        assert block_error_line({0: error}) is None
