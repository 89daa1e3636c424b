"""The report's pages: what they say for a run that is well, missed a gate, is unfinished or is hostile."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgecompress.errors import RunError
from edgecompress.reporting.report_page import markdown_text, report_document, write_report
from edgecompress.run_directory import RunDirectory, write_json
from report_runs import (
    BASELINE_PROFILE,
    GATES,
    HOSTILE,
    MANIFEST,
    PARITY,
    PROFILE,
    RECIPE,
    STAGES,
    full_run,
    hostile_run,
    make_run,
)

VOID = frozenset(("meta", "br", "img"))


class HtmlPage(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.policy = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.labels += [
            label for name, value in attrs if name == "aria-labelledby" and value for label in value.split()
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text, blanks collapsed."""
        return " ".join(" ".join(self.texts).split())


def _figure(part: dict[str, Any], name: str) -> dict[str, Any]:
    (figure,) = [figure for figure in part["figures"] if figure["id"] == name]
    return figure


def _render(run: RunDirectory) -> tuple[HtmlPage, str]:
    paths = write_report(run, "x86")
    return HtmlPage(paths.html.read_text(encoding="utf-8")), paths.markdown.read_text(encoding="utf-8")


def test_both_pages_carry_the_same_facts_in_the_order_of_the_questions(tmp_path: Path) -> None:
    page, markdown = _render(make_run(tmp_path / "run"))
    questions = [
        "May I ship this?",
        "What did I gain and pay?",
        "Can I trust it?",
        "Where does the time go?",
        "How was it made",
    ]
    for text in (page.text, markdown):
        places = [text.index(question) for question in questions]
        assert places == sorted(places)
        for fact in (
            "3.15 times fewer MACs",
            "9.80 times smaller",
            "1.87 times faster",
            "97.5 %",
            "112 kB",
            "31.2 dB",
            "99.9 %",
        ):
            assert fact in text, fact
        assert "edgecompress run recipes/prune_kd.yaml --target x86 --set stages.pruned.channel_ratio=0.5" in text
        assert "channel_ratio: 0.5" in text
        assert "9f2c41d7" in text
        assert MANIFEST["artifacts"]["export/model.int8.onnx"] in text
        assert "QLinearConv" in text
    assert "\N{MINUS SIGN}0.3 points" in page.text
    assert "-0.3 points" in markdown
    assert not page.open
    assert set(page.labels) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page, _ = _render(make_run(tmp_path / "run"))
    assert not page.tags & {"link", "iframe", "object", "base", "form", "image"}
    assert not page.attributes & {"srcset", "action", "xlink:href"}
    html = (tmp_path / "run" / "report" / "x86.html").read_text(encoding="utf-8")
    assert not re.findall(r"url\((?!#)", html)
    assert not re.findall(r"\b(?:href|src)=\"(?!#|data:image/png;base64,)", html)
    assert "@import" not in html
    assert html.count("<script>") == 1
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy


def test_the_document_is_json(tmp_path: Path) -> None:
    document = report_document(make_run(tmp_path / "run"), "x86")
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_rendering_again_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report(run, "x86")
    first = {path.name: path.read_bytes() for path in (run.path / "report").iterdir()}
    write_report(run, "x86")
    assert {path.name: path.read_bytes() for path in (run.path / "report").iterdir()} == first
    assert set(first) == {"x86.html", "x86.md", "x86.json"}


def test_only_the_formats_that_are_asked_for_are_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    paths = write_report(run, "x86", ["json"])
    assert [path.name for path in (run.path / "report").iterdir()] == ["x86.json"]
    assert paths.to_dict() == {"json": str(run.report_path("x86", "json"))}
    assert json.loads(paths.json.read_text(encoding="utf-8")) == report_document(run, "x86")


def test_a_file_that_was_changed_since_is_said_first_and_stays_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    parity = json.loads((run.export / "parity.json").read_text())
    write_json(run.export / "parity.json", parity | {"samples": 1})
    (run.export / "model.int8.onnx").unlink()
    recorded = run.read_manifest()["artifacts"]
    for _ in range(2):  # the first report must not make the new bytes the recorded ones
        paths = write_report(run, "x86")
        document = json.loads(paths.json.read_text())
        assert document["changed"] == ["export/model.int8.onnx", "export/parity.json"]
        first = document["decision"]["notes"][0]
        assert "export/model.int8.onnx, export/parity.json" in first
        assert "export/parity.json" in paths.html.read_text()
        assert first.split(":")[0] in capsys.readouterr().err
        assert run.read_manifest()["artifacts"].items() >= recorded.items()
    assert report_document(make_run(tmp_path / "well"), "x86")["changed"] == []


def test_a_run_that_meets_everything_ships(tmp_path: Path) -> None:
    decision = report_document(make_run(tmp_path / "run"), "x86")["decision"]
    assert decision["verdict"] == "ship"
    assert "4 gates and 3 budgets" in decision["headline"]
    budgets = {budget["name"]: budget for budget in decision["budgets"]}
    assert budgets["latency_ms_p90"]["ci95"] == PROFILE["models"]["int8"]["latency_ms"]["p90_ci95"]
    assert budgets["min_int8_speedup"]["ci95"] == [1.81, 1.93]


@pytest.mark.parametrize(
    ("limit", "low", "high", "status"),
    [(0.09, 0.0837, 0.0885, "met"), (0.085, 0.0837, 0.0885, "open"), (0.08, 0.0837, 0.0885, "missed")],
)
def test_budgets_of_the_target_are_judged_by_the_whole_interval(
    tmp_path: Path, limit: float, low: float, high: float, status: str
) -> None:
    profile = copy.deepcopy(PROFILE)
    del profile["budgets"]
    profile["models"]["int8"]["latency_ms"]["p90_ci95"] = [low, high]
    budgets = {"latency_ms_p90": limit, "max_accuracy_drop": 0.0028, "load_ms": None, "min_int8_speedup": 1.0}
    profile["target_facts"] = {"budgets": budgets}
    rows = report_document(make_run(tmp_path / "run", profile=profile), "x86")["decision"]["budgets"]
    assert {row["name"]: row["status"] for row in rows} == {
        "latency_ms_p90": status,
        "max_accuracy_drop": "met",
        "min_int8_speedup": "met",
    }
    assert rows[1]["value"] == pytest.approx(0.0028)


def test_a_gate_that_was_said_already_is_not_said_twice(tmp_path: Path) -> None:
    sentence = "int8 ONNX agrees with fp32 ONNX on 90.00% of predictions (at least 0.95)."
    gate = {"gate": "int8_min_top1_agreement", "passed": False, "sentence": sentence, "target": "x86"}
    profile = PROFILE | {"verdict": "hold", "reasons": [sentence]}
    run = make_run(
        tmp_path / "run", manifest={"gates": [gate]}, parity=PARITY | {"failures": [sentence]}, profile=profile
    )
    assert report_document(run, "x86")["decision"]["reasons"] == [sentence]


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (
            "manifest",
            {"gates": [{**GATES[0], "value": 0.08, "passed": False, "sentence": "Accuracy fell by 8 points."}]},
            "Accuracy fell by 8 points.",
        ),
        ("manifest", {"status": "failed"}, "failed"),
        (
            "manifest",
            {"stages": [{**STAGES[0], "status": "failed", "error": "loss is not finite"}]},
            "loss is not finite",
        ),
        ("parity", {"constant_predictions": True}, "one class for every image"),
        ("parity", {"failures": ["int8 agrees on 90 %"]}, "int8 agrees on 90 %"),
        ("parity", {"onnx_fp32": {"passed": False}}, "fp32 ONNX file"),
        ("profile", {"budgets": [{"budget": "size_bytes", "limit": 10, "value": 20, "status": "missed"}]}, "File size"),
        ("profile", {"verdict": "hold", "reasons": ["too slow"]}, "too slow"),
    ],
)
def test_nothing_missed_ever_looks_like_ship(tmp_path: Path, file: str, change: dict[str, Any], reason: str) -> None:
    files = {"manifest": MANIFEST, "parity": PARITY, "profile": PROFILE}
    files[file] = files[file] | change
    run = make_run(tmp_path / "run", **files)
    decision = report_document(run, "x86")["decision"]
    assert decision["verdict"] == "hold"
    assert reason in " ".join(decision["reasons"])
    page, markdown = _render(run)
    assert "Hold" in page.text
    assert "**Hold.**" in markdown
    assert "Everything asked for is met" not in page.text + markdown


def test_a_target_out_of_reach_is_not_measured_and_never_ships(tmp_path: Path) -> None:
    profile = {"measured": False, "not_measured_because": ["this machine is x86_64"], "verdict": "ship", "reasons": []}
    decision = report_document(make_run(tmp_path / "run", profile=PROFILE | profile), "x86")["decision"]
    assert decision["label"] == "Not measured"
    assert decision["reasons"] == ["this machine is x86_64"]


def test_the_way_from_the_baseline_stands_on_both_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", profile=BASELINE_PROFILE)
    gain = report_document(run, "x86")["gain"]
    assert [row["label"] for row in _figure(gain, "latency-figure")["rows"]] == ["baseline", "fp32", "int8"]
    changes = {change["what"]: change for change in gain["changes"]}
    assert changes["Latency"]["text"] == "5.83 times faster"
    assert (changes["Latency"]["before"], changes["Latency"]["after"]) == ("0.461 ms", "0.0790 ms")
    assert changes["int8 against fp32"]["text"] == "1.87 times faster"
    page, markdown = _render(run)
    for text in (page.text, markdown):
        assert "int8 runs 5.83 times faster than the baseline (95 % interval 5.71 to 5.96)" in text
        assert "1.87 times faster than the same network in fp32 (95 % interval 1.81 to 1.93)" in text
    assert "| On x86 | baseline | fp32 | int8 | int8 against baseline | int8 against fp32 |" in markdown
    row = "| Latency, median | 0.461 ms | 0.148 ms | 0.0790 ms | 5.83 times faster | 1.87 times faster |"
    assert row in markdown.splitlines()


def test_without_a_baseline_the_models_are_two(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    gain = report_document(run, "x86")["gain"]
    assert [row["label"] for row in _figure(gain, "latency-figure")["rows"]] == ["fp32", "int8"]
    assert "Latency" not in {change["what"] for change in gain["changes"]}
    _, markdown = _render(run)
    assert "| On x86 | fp32 | int8 | int8 is |\n|---|--:|--:|--:|\n| Latency, median | 0.148 ms" in markdown
    assert "than the baseline" not in markdown


def test_missing_files_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", parity=None, profile=None)
    page, markdown = _render(run)
    for text in (page.text, markdown):
        assert f"edgecompress export '{run.path}' --int8 --target x86" in text
        assert f"edgecompress profile '{run.path}' --target x86" in text
    assert "Not measured" in page.text


def test_a_failed_run_says_how_to_go_on(tmp_path: Path) -> None:
    failed = [STAGES[0], {"id": "pruned", "kind": "prune", "status": "failed", "error": "nothing was pruned"}]
    run = make_run(tmp_path / "run", manifest={"status": "failed", "stages": failed}, parity=None, profile=None)
    page, _ = _render(run)
    assert f"{MANIFEST['command']} --output {run.path} --resume" in page.text
    assert "Stage pruned failed: nothing was pruned" in page.text


def test_a_manifest_with_nothing_in_it_renders(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    write_json(run.manifest_path, {"schema_version": 1, "status": "running", "recipe_name": "mine"})
    write_json(run.export / "parity.json", {})
    write_json(run.profile_path("x86"), {})
    page, markdown = _render(run)
    assert "mine on x86" in page.text
    assert "No stage has finished yet" in markdown


def _places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every key, however deep; of lists only the first element."""
    if isinstance(document, dict):
        return [place for key in document for place in ((*here, key), *_places(document[key], (*here, key)))]
    return _places(document[0], (*here, 0)) if isinstance(document, list) and document else []


@pytest.mark.parametrize("file", ["manifest", "parity", "profile"])
def test_any_key_may_be_missing(tmp_path: Path, file: str) -> None:
    files = {"manifest": MANIFEST, "parity": PARITY, "profile": BASELINE_PROFILE}
    run = make_run(tmp_path / "run", profile=BASELINE_PROFILE)
    paths = {"manifest": run.manifest_path, "parity": run.export / "parity.json", "profile": run.profile_path("x86")}
    for place in _places(files[file]):
        if place == ("schema_version",):
            continue
        document = copy.deepcopy(files[file])
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        del parent[place[-1]]
        paths[file].write_text(json.dumps(document), encoding="utf-8")
        try:
            write_report(
                run, "x86", ["md", "json"]
            )  # all the facts; drawing them takes long, and needs no key of a file
        except Exception as error:
            raise AssertionError(f"{file} without {place}: {error!r}") from error


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(RunDirectory(tmp_path), "x86")


def test_slower_int8_and_lost_classes_are_said_first(tmp_path: Path) -> None:
    parity = copy.deepcopy(PARITY)
    parity["classes"][3] |= {"name": "owl", "accuracy_int8": 0.75, "flips": 9}
    parity["classes"][4] |= {"name": "one image lost", "samples": 4, "accuracy_fp32": 1.0, "accuracy_int8": 0.75}
    profile = PROFILE | {"int8_speedup": {"ratio": 0.8, "ci95": [0.77, 0.83]}, "verdict": "inconclusive", "reasons": []}
    notes = ["The weights are random."]
    run = make_run(tmp_path / "run", manifest={"notes": notes}, parity=parity, profile=profile)
    decision = report_document(run, "x86")["decision"]
    assert decision["notes"][0] == notes[0]
    assert "it takes 1.25 times as long (95 % interval 1.20 to 1.30)" in decision["notes"][1]
    assert "owl (-22.2)" in decision["notes"][2]
    assert "one image lost" not in decision["notes"][2]
    page, _ = _render(run)
    assert page.text.index("Int8 is slower than fp32 on x86") < page.text.index("random")
    assert page.text.index("random") < page.text.index("What did I gain")


def test_notes_on_the_data_stay_with_the_data(tmp_path: Path) -> None:
    notes = [*MANIFEST["data"]["notes"], "The weights are random."]
    document = report_document(make_run(tmp_path / "run", manifest={"notes": notes}), "x86")
    assert document["decision"]["notes"] == ["The weights are random."]
    assert document["making"]["data_notes"] == MANIFEST["data"]["notes"]


def test_notes_on_layers_stay_with_the_layers(tmp_path: Path) -> None:
    note = "stage int8: 1 channels give one value whatever the image shows: stem (1 of 8)."
    stages = [*MANIFEST["stages"][:-1], MANIFEST["stages"][-1] | {"layer_notes": [note]}]
    changes = {"notes": [note, "The weights are random."], "stages": stages}
    document = report_document(make_run(tmp_path / "run", manifest=changes), "x86")
    assert document["decision"]["notes"] == ["The weights are random."]
    assert note in document["trust"]["remarks"]


def test_a_profile_of_other_files_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    run.write_document(run.profile_path("x86"), PROFILE | {"files": run.exported_files("x86")})
    before = report_document(run, "x86")
    assert (before["stale_profile"], before["missing"]) == (None, [])
    with run.replacing(run.export):  # as another export does
        (run.export / "model.int8.onnx").write_bytes(b"other contents")
    document = json.loads(write_report(run, "x86").json.read_text())
    first = document["decision"]["notes"][0]
    assert first.startswith("The profile for x86 is of other files than those exported now")
    assert document["decision"]["verdict"] != "ship"
    assert not document["decision"]["budgets"]
    assert [row["what"] for row in document["missing"]] == ["profile"]
    assert first in capsys.readouterr().err


def test_worst_classes_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    names = [
        {"name": f"class {i}", "samples": 10, "accuracy_fp32": 0.9, "accuracy_int8": 0.9 - i / 1000, "flips": i}
        for i in range(525)
    ]
    run = make_run(tmp_path / "run", parity=PARITY | {"classes": names})
    trust = report_document(run, "x86")["trust"]
    assert [row["name"] for row in trust["classes"]] == [f"class {524 - i}" for i in range(20)]
    assert trust["classes_hidden"] == 504
    page, markdown = _render(run)
    assert "504 more" in page.text
    assert "504 more" in markdown
    assert (run.path / "report" / "x86.html").stat().st_size < 400_000


def test_the_page_says_what_explains_the_latency(tmp_path: Path) -> None:
    profile = copy.deepcopy(PROFILE)
    modules = [
        {
            "module": f"layer{k}.conv",
            "ms": 0.01 * (20 - k),
            "share": 0.05,
            "operators": {"QLinearConv": 2},
            "modules": 1,
        }
        for k in range(12)
    ]
    profile["models"]["int8"] |= {"modules": modules, "model_rss_bytes": 12_300_000, "arena_bytes": 4_500_000}
    island = {"op_types": {"Softmax": 1}, "nodes": ["head/Softmax"], "node_count": 1, "macs_share": 0.0}
    profile["models"]["int8"]["float_islands"] = [island | {"reason": "the CPU provider has no integer kernel for it"}]
    interval = {"latency_ms_p50": 0.079, "throughput_per_s": 12658.0}
    profile["scaling"] = {
        "int8": {
            "threads": [
                interval | {"threads": 1, "speedup": 1.0, "speedup_ci95": [1.0, 1.0], "efficiency": 1.0},
                interval | {"threads": 2, "speedup": 1.62, "speedup_ci95": [1.55, 1.7], "efficiency": 0.81},
            ],
            "batch": [],
            "left_out": [],
        }
    }
    peak = {"float_gmacs_per_s": 95.0, "int8_gmacs_per_s": 1240.0, "memory_gb_per_s": 24.6}
    share = {"gmacs_per_s": 10.3, "share_of_peak": 0.0083, "share_of_convolution_peak": 0.027}
    profile["roofline"] = {"threads": {"1": peak}, "models": {"int8": share}}
    profile["options"] = {
        "best": {"options": ["no memory arena"], "python": "options.enable_cpu_mem_arena = False"},
        "checked": {"speedup": 1.2, "speedup_ci95": [1.1, 1.3]},
        "rows": [],
    }
    page, markdown = _render(make_run(tmp_path, profile=profile))
    for wanted in (
        "layer0.conv",
        "2 QLinearConv",
        "2 more",  # of twelve modules the ten dearest are listed
        "2 threads",
        "81.0",
        "1.62 [1.55, 1.70]",
        "1,240 in int8",
        "adds 12.3",
        "no integer kernel",
        "enable_cpu_mem_arena = False",
    ):
        assert wanted in page.text, wanted
        assert wanted.replace("[", "\\[").replace("]", "\\]") in markdown or wanted in markdown, wanted
    assert "layer11.conv" not in page.text


def test_broken_characters_are_written_and_read_back(tmp_path: Path) -> None:
    document = {"key \udcff": "caf\u00e9 \ud800", "list": ["\udc80\n"], "backslash": "\\ud800"}
    write_json(tmp_path / "file.json", document)
    assert json.loads((tmp_path / "file.json").read_bytes()) == document


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    plain, _ = _render(make_run(tmp_path / "plain"))
    page, markdown = _render(hostile_run(tmp_path / "hostile"))
    allowed = plain.tags | {"div", "p", "ul", "li", "table", "td"}
    assert page.tags <= allowed
    assert page.attributes <= plain.attributes | {"role"}
    assert not page.open
    assert HOSTILE[0] in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert HOSTILE[4] in page.text
    assert HOSTILE[5] in page.text
    for text in (page.text, markdown):
        assert not set(text) & set("\x1b\x00\u202e\u202c")
        assert "x" * 100 not in text.split("Can I trust it?")[1]  # long names are cut
    prose = "\n".join(part for i, part in enumerate(markdown.split("```")) if i % 2 == 0)
    assert "<" not in prose
    assert "\n# f" not in markdown


def test_hostile_rows_keep_their_cells_in_markdown(tmp_path: Path) -> None:
    _, markdown = _render(hostile_run(tmp_path / "run"))
    width = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.replace("\\|", "").count("|")
        width = width or cells
        assert cells == width, line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", "a\\|b"),
        ("`code`", "\\`code\\`"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("line\n# heading", "line \\# heading"),
        ("latency_ms", "latency_ms"),
        ("_emphasis_", "\\_emphasis\\_"),
        (-0.3, "-0.3"),
    ],
)
def test_markdown_text(text: object, expected: str) -> None:
    assert markdown_text(text) == expected


def test_a_fence_is_longer_than_any_run_of_backticks_in_the_recipe(tmp_path: Path) -> None:
    recipe = RECIPE | {"description": "```\n# not a heading\n````"}
    _, markdown = _render(make_run(tmp_path / "run", manifest={"recipe": recipe}))
    assert "`````\nname: prune_kd" in markdown


def test_parity_in_other_settings_reaches_the_page() -> None:
    from edgecompress.reporting.report_trust import trust_facts

    run = {"batch": 1, "threads": 1, "graph_optimization": "all", "top1_agreement": 1.0, "max_abs_diff": 0.0}
    parity = {
        "variants": {"int8": {"runs": [run | {"passed": True}]}},
        "ort_format": {
            "fp32": {"top1_agreement": 0.5, "passed": False},
            "mobile_usability": {"fp32": {"nnapi": {"with_fixed_shapes": "YES"}}},
        },
        "with_preprocessing": {"fp32": {"top1_agreement": 0.998, "passed": True}},
        "onnx_int8": {"mcnemar": {"lost": 4, "won": 1, "p_value": 0.375}},
        "worst_class": {"sentence": "Class x loses 3.0 points by int8 on 40 images."},
    }
    facts = trust_facts({}, parity, "x86")
    rows = {row["what"]: row["passed"] for row in facts["comparisons"]}
    assert rows == {
        "ONNX int8, batch 1, threads: 1": True,
        "ORT format fp32": False,
        "ONNX fp32, preprocessing inside": True,
    }
    assert "lost 4 images that fp32 had right and won 1 (McNemar's exact test: p = 0.38)" in facts["remarks"][0]
    assert facts["remarks"][1] == "Class x loses 3.0 points by int8 on 40 images."
    assert "on fp32, with shapes fixed: nnapi YES" in facts["remarks"][2]


def test_flips_confusions_confidence_and_layers_stand_on_every_page(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", names=("owl",))
    causes = [{"kind": "range", "words": "One activation is huge.", "setting": "calibration.method: percentile"}]
    write_json(run.stage("int8") / "debug.json", {"layers": [{"layer": "stem", "causes": causes}], "model": []})
    page, markdown = _render(run)
    for text in (page.text, markdown):
        for fact in ("Images that flipped", "Expected calibration error", "One activation is huge.", "percentile"):
            assert fact in text, fact
        assert "image 0" in text
    assert "| owl | class 0 | 1 | 4 |" in markdown
    trust = json.loads(run.report_path("x86", "json").read_text(encoding="utf-8"))["trust"]
    assert trust["flipped"][0]["name"] == "owl"
    assert trust["flipped"][0]["images"][0]["picture"].startswith("data:image/png;base64,")
    assert "img" in page.tags


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "flipped/none.png", "flipped/text.png", 7, None])
def test_only_a_picture_of_the_export_is_taken_into_the_page(tmp_path: Path, name: object) -> None:
    run = make_run(tmp_path / "run", parity=PARITY | {"flipped": [{"class": "a", "image": 1, "picture": name}]})
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n secret")
    (run.export / "flipped").mkdir()
    (run.export / "flipped" / "text.png").write_text("<svg onload=alert(1)>")
    (image,) = report_document(run, "x86")["trust"]["flipped"][0]["images"]
    assert image["picture"] is None


def test_zeros_among_the_weights_are_called_what_they_are(tmp_path: Path) -> None:
    stages = copy.deepcopy(STAGES)
    stages[1]["sparsity"] = 0.8
    page, markdown = _render(make_run(tmp_path / "run", manifest={"stages": stages}))
    for text in (page.text.replace("\N{NO-BREAK SPACE}", " "), markdown):
        assert "Stage pruned has 80.0 % zeros among its weights. ORT's CPU kernels gain no speed from zeros." in text
        assert "They buy compressed size: 309 kB of 338 kB." in text
    assert "zeros among" not in _render(make_run(tmp_path / "other"))[1]


def test_a_line_of_metrics_that_is_no_json_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: a line of it is no JSON"):
        report_document(run, "x86")


def test_a_stage_without_latency_says_why(tmp_path: Path) -> None:
    """Of the stages only the baseline, the last float one and int8 are exported; a dash would look like a fault."""
    stages = copy.deepcopy(MANIFEST["stages"])
    middle = {**stages[1], "id": "halfway"}
    running = {"id": "late", "kind": "train", "status": "pending"}
    run = make_run(
        tmp_path / "run", manifest={"stages": [stages[0], middle, *stages[1:], running]}, profile=BASELINE_PROFILE
    )
    rows = {row["id"]: row["unmeasured"] for row in report_document(run, "x86")["gain"]["stages"]}
    assert rows == {"dense": None, "halfway": "not exported", "pruned": None, "int8": None, "late": None}
    paths = write_report(run, "x86")
    assert paths.html is not None
    assert paths.markdown is not None
    assert paths.html.read_text(encoding="utf-8").count('<span class="muted">not exported</span>') == 2
    assert "| not exported | not exported |" in paths.markdown.read_text(encoding="utf-8")
    elsewhere = make_run(tmp_path / "far", manifest={}, profile=PROFILE | {"measured": False, "models": {}})
    assert {row["unmeasured"] for row in report_document(elsewhere, "x86")["gain"]["stages"]} == {"not measured"}
