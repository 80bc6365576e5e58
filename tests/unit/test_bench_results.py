"""Results of benchmarks: rows, files, tables, pictures, documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from e2e_bench import documents, evidence, picture, report, tables
from e2e_bench.report import MalformedResults, Row
from e2e_bench.run_log import RunLog
from e2e_bench.serving import figures

ROWS = [
    Row("dec.a", "fi_backend", 8.0, 7.5, 9.0, 4000.0, 1.5, 4.0, 0.7),
    Row("dec.a", "fa3", 10.0, 9.0, 11.0, 3200.0, 1.2, 4.0, 0.8),
    Row("dec.a", "flashinfer_fa2", 6.4, 6.0, 7.0, 5000.0, 1.9, 4.0, 0.9),
    Row("pre.b", "fi_backend", 2773.4, 2700.0, 2900.0, 10.0, 600.0, 1000.0, 1.1),
]


def header(**extra: Any) -> dict[str, Any]:
    return report.meta({"cuda": "13.0"}, gpu="NVIDIA H200") | extra


def test_row_of_timed_calls() -> None:
    row = Row.of(
        "w", "i", [4.0, 2.0, 3.0], num_bytes=6e3, flops=3e6, error_ratio=0.51, floor_us=1.234
    )
    assert row == Row("w", "i", 3.0, 2.0, 4.0, 2.0, 1.0, 1.23, 0.51)
    assert Row.of_times("w", "i", [4.0, 2.0]) == Row("w", "i", 3.0, 2.0, 4.0)


def test_files_keep_rows_and_header(tmp_path: Path) -> None:
    path = tmp_path / "kernels-h200.json"
    report.write(path, header(), ROWS)
    loaded, rows = report.load(path)
    assert rows == ROWS
    assert loaded == header()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_run_writes_what_failed_beside_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "gpu_name", lambda: "NVIDIA H200")
    path, log = tmp_path / "ops-h200.json", RunLog()
    with log.attempt("pre.c", "fa3"):
        raise ValueError("no such workload")
    log.write(path, [])
    log.write(None, ROWS)
    assert not path.exists()
    log.write(path, ROWS, method="in turns")
    loaded, rows = report.load(path)
    assert rows == ROWS
    assert (loaded["gpu"], loaded["method"]) == ("NVIDIA H200", "in turns")
    assert [f["workload"] for f in loaded["failures"]] == ["pre.c"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"meta": None}, "TypeError"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"workload": "w"}]}, "missing 4 required"),
        ({"rows": [vars(ROWS[0]) | {"speed": 3}]}, "speed"),
        ({"rows": [vars(ROWS[0]) | {"us_median": "8"}]}, "us_median is '8'"),
        ({"rows": [vars(ROWS[0]) | {"us_min": 8.5}]}, "out of order"),
        ({"meta": {"gpu": "H200"}}, "meta lacks date, commit, kernels_hash, planner_hash"),
        ({"meta": {k: v for k, v in header().items() if k != "gpu"}}, "meta lacks gpu or cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_files_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "plan-h200.json"
    path.write_text(json.dumps({"meta": header(), "rows": [vars(row) for row in ROWS]} | change))
    with pytest.raises(MalformedResults, match=rf"plan-h200\.json.*{reason}"):
        evidence.gather(tmp_path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jit-h200.json").write_text("{")
    with pytest.raises(MalformedResults, match=r"jit-h200\.json: JSONDecodeError"):
        evidence.gather(tmp_path)


def test_fresh_and_stale(tmp_path: Path) -> None:
    report.write(tmp_path / "kernels-h200.json", header(), ROWS)
    report.write(tmp_path / "plan-h200.json", header(planner_hash="0" * 12), ROWS)
    # Other tools' files only need the header.
    (tmp_path / "tests-h200.json").write_text(json.dumps({"meta": header(kernels_hash="0")}))
    found = evidence.gather(tmp_path)
    assert [one.stale for one in found] == [(), ("planner",), ("kernels",)]
    lines = evidence.summary(found).splitlines()
    assert lines[0].endswith("NVIDIA H200: fresh")
    assert lines[1].endswith("STALE: planner changed since")
    assert lines[-1] == "2 of 3 results are stale"


def test_the_hash_follows_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.h"
    source.write_text("int a;")
    before = report.hash_files(["kernels"])
    (tmp_path / "kernels" / "notes.txt").write_text("no source")
    assert report.hash_files(["kernels"]) == before
    source.write_text("int b;")
    assert report.hash_files(["kernels"]) != before


def test_the_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_COMMIT", "abc1234")
    assert report.meta()["commit"] == "abc1234"


def test_the_commit_without_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FI_COMMIT", raising=False)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.meta()["commit"] == "unknown"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA B200-180G", "b200")],
)
def test_files_are_named_by_the_gpu(name: str, slug: str) -> None:
    assert report.gpu_slug(name) == slug


def test_kernel_table() -> None:
    assert tables.kernel_table(ROWS).splitlines() == [
        "| workload | floor | fi_backend | FA3 | FlashInfer fa2 | of best peer | of floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| dec.a | 4.00 | 8.00 | 10.0 | **6.40** | 1.25 | 2.00 |",
        "| pre.b | 1,000 | 2,773 | – | – | – | 2.77 |",
    ]


def test_a_table_without_us() -> None:
    line = tables.kernel_table(ROWS[1:2]).splitlines()[-1]
    assert line == "| dec.a | 4.00 | **10.0** | – | – |"


def test_limits_stand_beside_the_floor_of_shared_prefixes() -> None:
    rows = [*ROWS[:2], Row("shared.64", "fi_backend", 58.0, 57.0, 59.0, floor_us=38.19)]
    assert tables.kernel_table(rows).splitlines() == [
        "| workload | floor | limit | fi_backend | FA3 | of best peer | of floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| dec.a | 4.00 |  | 8.00 | **10.0** | 0.80 | 2.00 |",
        "| shared.64 | 38.2 | 60.9 | 58.0 | – | – | 1.52 |",
    ]


def test_limits_of_finding_prefixes() -> None:
    names = ("detect.nothing.r256.page16", "detect.8x4k.r256.page1", "decode.r256")
    rows = [Row(f"{name}.device", "fi_backend", 9.0, 8.0, 10.0) for name in names]
    rows.append(Row("detect.8x4k.r256.page1.forest", "fi_backend", 9.0, 8.0, 10.0))
    time = "9.00 µs (8.00 µs – 10.0 µs)"
    assert tables.time_table(rows).splitlines() == [
        "|  | fi_backend | limit |",
        "| --- | --- | --- |",
        f"| detect.nothing.r256.page16.device | {time} | 12.0 µs |",
        f"| detect.8x4k.r256.page1.device | {time} | 20.0 µs |",
        f"| decode.r256.device | {time} |  |",
        f"| detect.8x4k.r256.page1.forest | {time} |  |",
    ]


def test_sharing_table() -> None:
    rows = [
        Row("nothing.a.step", "fi_backend", 101.0, 100.0, 102.0),
        Row("nothing.a.step", "fi_backend_no_sharing", 100.0, 99.0, 101.0),
        Row("shared.n4.step", "fi_backend", 9.0, 8.0, 10.0),
    ]
    assert tables.sharing_table(rows).splitlines() == [
        "|  | looked for | not | of not looking | limit |",
        "| --- | --- | --- | --- | --- |",
        "| nothing.a.step | 101 µs (100 µs – 102 µs) | 100 µs (99.0 µs – 101 µs) | 1.010 | 1.02 |",
        "| shared.n4.step | 9.00 µs (8.00 µs – 10.0 µs) | – | – |  |",
    ]
    text = documents.section(Path("sharing-h200.json"), header(), rows)
    assert tables.sharing_table(rows) in text


def test_time_table() -> None:
    rows = [Row("a", "fi_backend", 0.41, 0.4, 0.5), Row("b", "fa3", 21e3, 9e3, 2e6)]
    assert tables.time_table(rows).splitlines() == [
        "|  | fi_backend | FA3 |",
        "| --- | --- | --- |",
        "| a | 0.410 µs (0.400 µs – 0.500 µs) | – |",
        "| b | – | 21.0 ms (9,000 µs – 2,000 ms) |",
    ]


def test_spread_table() -> None:
    line = tables.spread_table(ROWS).splitlines()[2]
    assert line == "| dec.a | fi_backend | 8.00 | 7.50 – 9.00 | 4,000 | 1.5 | 0.70 |"


def test_picture(tmp_path: Path) -> None:
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        picture.draw(header(), ROWS, path)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    for word in ("dec.a", "pre.b", "FlashInfer fa2", "fi_backend", "NVIDIA H200"):
        assert f"<!-- {word}" in text


def test_picture_of_streaming(tmp_path: Path) -> None:
    rows = [
        Row(f"llama.b1.w9.{part}", impl, us, us, us)
        for part, inside in (("step", 8.0), ("attention", 3.0))
        for impl, us in ((tables.OURS, inside), (tables.APART, 10.0))
    ]
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        picture.draw_streaming(header(), rows, path)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    for word in ("llama.b1.w9", "step", "attention", "NVIDIA H200"):
        assert f"<!-- {word}" in text


def test_picture_of_servers(tmp_path: Path) -> None:
    rows = [
        {
            "engine": "vllm",
            "shape": "llama",
            "backend": backend,
            "workload": "mixed1k",
            "output_throughput": 100.0,
            "median_itl_ms": 0.5,
            "median_tpot_ms": tpot,
        }
        for backend, tpot in (("CUSTOM", 7.25), ("TRITON_ATTN", 9.5))
    ]
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        figures.draw_svg(path, rows)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    for word in ("CUSTOM", "TRITON_ATTN", "vllm · llama · mixed1k", "7.25", "9.5"):
        assert f"<!-- {word}" in text


def test_the_pictures_of_the_results_are_drawn() -> None:
    text = (report.ROOT / "docs" / "results.md").read_text()
    shown = set(re.findall(r"\.\./e2e_bench/results/([\w-]+\.svg)", text))
    assert shown
    assert {name for name in shown if not (report.RESULTS / name).exists()} == set()


def test_documents_are_rewritten_between_markers() -> None:
    text = "a\n<!-- results: x -->\nold\n<!-- end -->\nb\n<!-- results: y -->\n<!-- end -->\n"
    new = documents.rewrite(text, {"x": "new | 1.5 \\d"})
    assert new == text.replace("old", "new | 1.5 \\d")
    assert documents.rewrite(new, {"x": "old"}) == text


def test_section_of_a_kernel_run() -> None:
    failures = [{"workload": "dec.a", "impl": "fa3", "error": "x"}]
    text = documents.section(Path("kernels-h200.json"), header(failures=failures), ROWS)
    assert "(../e2e_bench/results/kernels-h200.svg)" in text
    assert "Failed: dec.a fa3" in text
    assert tables.kernel_table(ROWS) in text
    assert tables.spread_table(ROWS) in text


def test_the_document_has_a_place_for_every_result() -> None:
    places = {match["name"] for match in documents.MARKER.finditer(documents.DOCUMENT.read_text())}
    wanted = {f"{n}-h200" for n in ("kernels", "plan", "sharing", "ops", "jit")} | {"cpu"}
    committed = {path.stem for path in report.RESULTS.glob("*.json") if report.has_rows(path)}
    assert places == wanted | committed


def test_the_document_shows_the_committed_results() -> None:
    text, sections = documents.DOCUMENT.read_text(), {}
    for path in filter(report.has_rows, report.RESULTS.glob("*.json")):
        sections[path.stem] = documents.section(path, *report.load(path))
    assert documents.rewrite(text, sections) == text, "run `python -m e2e_bench report`"
