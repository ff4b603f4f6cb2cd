import json
import re
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench.gpu import verdict
from bench.gpu.verdict import TARGETS, Records
from bench.providers import CAPTURED, COMPILED, FLAT_COPY, OWN_COPY, PLAN, TRITON

ENVIRONMENT = {
    "device": "cuda",
    "device_name": "GPU",
    "torch_version": "2.11.0",
    "torch_cuda": "13.0",
    "foreach_arguments": "4 KB",
}
F32, MIXED = "float32/float32", "float32/bfloat16"
ROOT = Path(__file__).parents[1]
H200 = ROOT / "bench" / "results" / "h200"
FIRST = (
    "bench",
    "bench_mixed",
    "bench_bf16",
    "launches",
    "step",
    "step_vit",
    "compile",
    "small500",
)


def op(case, provider, ms, *, pair=F32, op="update", elements=10**8, **more):
    """A record with round figures: a speed of a million over the milliseconds."""
    families = {"fused": "ours", "own c": "limit", "trito": "triton", "naive": "naive"}
    family = families.get(provider[:5], "compile" if provider == COMPILED else "foreach")
    ema, param = pair.split("/")
    return {
        **{"case": case, "title": case, "op": op, "provider": provider, "family": family},
        **{"kind": family if family in ("ours", "limit", "triton") else "torch", "cache": "cold"},
        **{"ema_dtype": ema, "param_dtype": param, "num_elements": elements, "note": ""},
        **{"ms": ms, "gb_per_s": 1e6 / ms, "fraction_of_copy": 1 / ms},
        **{"ms_p10": 0.99 * ms, "ms_p90": 1.01 * ms, "num_dry": 0},
        **{"host_us": 10.0, "wall_us": 1000 * ms, **more},
    }


def judged(*contents):
    records = Records({"environment": ENVIRONMENT, **content} for content in contents)
    return {row[0]: row[1:] for row in verdict.lines(records)}


def test_nothing_measured_is_said_for_every_target():
    rows = judged()
    assert len(rows) == len(TARGETS)
    assert {row[-1] for row in rows.values()} == {"not measured"}


def test_records_of_a_processor_do_not_count():
    content = {"environment": ENVIRONMENT | {"device": "cpu"}, "records": [op("single", PLAN, 1.0)]}
    records = Records([content])
    assert records.ops == []
    assert verdict.described(records) == "no record of a GPU"


def test_the_worst_case_counts():
    rows = judged(
        {"records": [op("single", PLAN, 0.99), op("vit_l16", PLAN, 1.25)]},
        {"records": [op("small", PLAN, 9.0, elements=640_000)]},  # Too small a list to be asked.
    )
    assert rows["update fp32, of copy"] == (">= 1", "0.80", "vit_l16", "MISSED")
    assert judged({"records": [op("single", PLAN, 0.99)]})["update fp32, of copy"][-1] == "met"


def test_a_hot_record_does_not_count():
    assert judged({"records": [op("single", PLAN, 2.0, cache="hot")]})["update fp32, of copy"] == (
        *(">= 1", "", "", "not measured"),
    )


def test_against_others_on_the_same_tensors():
    rows = judged(
        {
            "records": [
                op("vit_l16", PLAN, 2.0),
                op("vit_l16", "foreach lerp_", 2.2),
                op("vit_l16", "naive lerp_", 1.0),
                op("vit_l16", TRITON, 1.9),
                op("vit_l16", PLAN, 1.0, pair=MIXED),
                op("vit_l16", TRITON, 1.5, pair=MIXED),
                op("vit_l16", "foreach cast lerp_", 2.6, pair=MIXED),
                op("vit_l16", "naive mul_ add_", 2.4, pair=MIXED),
                op("resnet50", PLAN, 1.0),
                op("resnet50", COMPILED, 1.5),
            ]
        }
    )
    assert rows["update fp32, against foreach"] == (
        *(">= 1.15x", "1.10x", "vit_l16, foreach lerp_", "MISSED"),
    )
    assert rows["update fp32/bf16, against best torch"] == (
        *(">= 2.00x", "2.40x", "vit_l16, naive mul_ add_", "met"),
    )
    assert rows["against Triton"] == (">= 1.00x", "0.95x", "vit_l16, triton", "MISSED")
    assert rows["against compiled foreach"][1:] == ("1.50x", f"resnet50, {COMPILED}", "met")


def test_small_lists_in_microseconds_and_end_to_end():
    rows = judged(
        {
            "records": [
                op("small", PLAN, 0.015),
                op("small", CAPTURED, 0.018),
                op("small", "foreach lerp_", 2.0, wall_us=400.0),
                op("small_500", PLAN, 0.01, host_us=12.0, cache="hot"),
                op("small_500", "foreach lerp_", 0.1, host_us=120.0, cache="hot"),
                op("single", PLAN, 5.0),
                op("single", CAPTURED, 5.9),
            ]
        }
    )
    assert rows["10,000 x 64 on the device"] == ("<= 20.0 us", "15.0 us", "small", "met")
    assert rows["10,000 x 64 end to end, against foreach"][1:] == (
        *("26.67x", "small, foreach lerp_", "met"),
    )
    assert rows["host time, against foreach"][1] == "10.00x"
    assert rows["host time, 5,000 pairs"][-1] == "not measured"
    assert rows["captured, beyond the bare kernel"] == ("<= 2.0 us", "3.0 us", "small", "MISSED")


def test_odd_and_misaligned_lists_against_aligned_ones():
    rows = judged(
        {
            "records": [
                op("odd", PLAN, 1.0),
                op("even", PLAN, 0.95),
                op("misaligned", PLAN, 1.0, pair=MIXED),
                op("medium", PLAN, 0.5, pair=MIXED),
                op("misaligned", PLAN, 9.0),  # Its aligned list was not measured.
            ]
        }
    )
    assert rows["odd sizes and misaligned, of aligned"] == (
        *(">= 0.90", "0.50", "misaligned, float32/bfloat16", "MISSED"),
    )


def test_launches():
    row = {"case": "small", "op": "swap", "provider": PLAN, "kernels": 1, "copies": 0, "waits": 0}
    other = {**row, "provider": "foreach lerp_", "kernels": 157}
    rows = judged({"records": [row, other]})
    assert rows["one launch: update, swap, copy"] == ("= 1", "1", "small swap", "met")
    assert rows["host synchronisations"] == ("= 0", "0", "small swap", "met")
    for waits in (2, -1):  # A profiler that sees less than nothing has seen nothing.
        rows = judged({"records": [row, {**row, "case": "odd", "waits": waits, "kernels": 0}]})
        assert rows["host synchronisations"][1:] == (str(waits), "odd swap", "MISSED")
        assert rows["one launch: update, swap, copy"][1:] == ("0", "odd swap", "MISSED")


def test_runs_are_not_mixed():
    plan, other = op("resnet50", PLAN, 1.0), op("resnet50", COMPILED, 0.9)
    assert judged({"records": [plan]}, {"records": [other]})["against compiled foreach"][-1] == (
        "not measured"
    )
    rows = judged({"records": [plan]}, {"records": [op("resnet50", PLAN, 0.8), other]})
    assert rows["against compiled foreach"][1:] == ("1.12x", f"resnet50, {COMPILED}", "met")


@pytest.mark.parametrize(("ms", "status"), [(0.9, 0), (1.1, 1)])
def test_command_names_the_foreach_and_tells_by_its_status(ms, status, tmp_path, capsys):
    ways = ("off", "naive", "foreach", "manager", "side stream", "captured off", "captured")
    rows = [{"way": way, "ms": 100.0, "share_of_step": 0.01, "rounds": 30} for way in ways]
    contents = [
        {"records": [op("single", PLAN, ms), op("single", OWN_COPY, 1.0, op="copy")]},
        {"results": [{"title": "ViT-L/16", "rows": rows}]},
    ]
    files = []
    for i, content in enumerate(contents):
        files.append(str(tmp_path / f"{i}.json"))
        (tmp_path / f"{i}.json").write_text(json.dumps({"environment": ENVIRONMENT, **content}))
    assert cli.main(["verdict", *files, "--markdown"]) == status
    printed = capsys.readouterr().out
    assert "Targets: GPU, torch 2.11.0 (CUDA 13.0; its foreach passes 4 KB of arguments)" in printed
    assert "own copy kernel: 1,000,000 GB/s" in printed
    assert "ViT-L/16: of a step of 100.0 ms, naive 1.00%, foreach 1.00%, manager 1.00%" in printed
    assert f"| single | update | {F32} | {1e6 / ms:,.0f} | {1 / ms:.0%} |" in printed


def test_against_torch_s_flat_ops():
    rows = judged(
        {
            "records": [
                op("vit_l16", PLAN, 1.0),
                op("vit_l16", "flat lerp_", 0.5),
                op("vit_l16", PLAN, 1.0, op="swap"),
                op("vit_l16", FLAT_COPY, 0.8, op="swap"),
                op("single", PLAN, 1.0, op="copy"),
                op("single", FLAT_COPY, 1.25, op="copy"),
            ]
        }
    )
    assert rows["update fp32, of torch's flat lerp_"][1:] == ("0.50", "vit_l16", "MISSED")
    assert rows["swap fp32, of cudaMemcpy"][1:] == ("0.80", "vit_l16", "MISSED")
    assert rows["copy fp32, of cudaMemcpy"][1:] == ("1.25", "single", "met")


def test_a_run_without_a_flat_copy_in_each_table_has_that_of_the_flat_case():
    rows = judged(
        {
            "records": [
                op("vit_l16", PLAN, 1.0, op="swap"),
                op("single", "naive copy_", 0.9, op="copy"),
            ]
        },
        {"records": [op("single", "naive copy_", 0.1, op="copy")]},  # Of another run.
    )
    assert rows["swap fp32, of cudaMemcpy"][1:] == ("0.90", "vit_l16", "MISSED")


def test_few_rounds_of_a_step_are_called_noise():
    def told(rounds):
        rows = [
            {"way": way, "ms": 80.0, "share_of_step": 0.01, "rounds": rounds}
            for way in ("off", "naive")
        ]
        content = {"results": [{"title": "ViT", "rows": rows}], "environment": ENVIRONMENT}
        return verdict.step_lines(Records([content]))

    assert told(30) == ["ViT: of a step of 80.0 ms, naive 1.00%"]
    assert told(29) == ["ViT: of a step of 80.0 ms, naive 1.00% (29 rounds: the order is noise)"]


def test_host_times_are_those_measured_by_themselves():
    def host(row, num_tensors, p50, p99, cores="idle", cache="hot"):
        record = {"row": row, "num_tensors": num_tensors, "cores": cores, "cache": cache}
        return record | {"host_us_p50": p50, "host_us_p90": p99, "host_us_p99": p99}

    rows = judged(
        {
            "records": [
                host("plan", 500, 7.0, 50.0),
                host("plan", 500, 90.0, 90.0, cache="swept"),
                host("plan", 5000, 120.0, 130.0),
                host("plan, emas flat", 5000, 60.0, 70.0),
                host("plan", 500, 10.0, 40.0, cores="busy"),
                host("foreach", 500, 10.0, 90.0, cores="busy"),
            ]
        }
    )
    assert rows["host time, 500 pairs"][1:] == ("7.0 us", "plan", "met")
    assert rows["host time, 5,000 pairs"][1:] == ("120.0 us", "plan", "MISSED")
    assert rows["host time, 5,000 emas flat"][1:] == ("60.0 us", "plan, emas flat", "met")
    tail = rows["host time among busy cores, p99 of p50"]
    assert tail[1:] == ("4.00x", "500, plan", "MISSED")


def old(*arguments, **more):
    record = op(*arguments, **more)
    del record["num_dry"]
    return record


def test_a_graph_of_its_own_is_not_fit_to_judge_a_captured_call():
    content = {"environment": ENVIRONMENT, "records": [op("small", PLAN, 0.015)]}
    content["records"].append(old("small", CAPTURED, 0.03))
    records = Records([content])
    rows = {row[0]: row[1:] for row in verdict.lines(records)}
    assert rows["captured, beyond the bare kernel"] == ("<= 2.0 us", "", "", "not fit")
    assert rows["10,000 x 64 on the device"][-1] == "met"
    assert verdict.unfit_lines(records) == [
        f"not fit: {CAPTURED} on small update {F32} cold: made before captured calls were nodes of "
        "one graph: a graph's launch is in it"
    ]
    content["records"][1] = op("small", CAPTURED, 0.03)
    assert judged(content)["captured, beyond the bare kernel"][-1] == "MISSED"


@pytest.mark.parametrize("make", [old, op])
def test_a_stalled_median_is_not_fit_and_a_stalled_tail_is(make):
    def rows_of(**spread):
        content = {"records": [make("single", PLAN, 2.0, **spread), op("single", TRITON, 1.0)]}
        return judged(content), Records([{"environment": ENVIRONMENT, **content}])

    rows, records = rows_of(ms_p10=0.9, ms_p90=4.0)
    assert rows["against Triton"][1:] == ("", "", "not fit")
    assert rows["update fp32, of copy"][1:] == ("", "", "not fit")
    (line,) = verdict.unfit_lines(records)
    assert ("made before samples in which the GPU ran dry" in line) == (make is old)
    assert line.endswith("its median of 2 ms is 2 times its p10, p90 4: as where the host stalls")
    rows, records = rows_of(ms_p10=1.9, ms_p90=400.0)
    assert rows["against Triton"][1:] == ("0.50x", "single, triton", "MISSED")
    assert verdict.unfit_lines(records) == []


def test_of_the_first_h200_run_what_is_known_as_wrong_is_not_judged():
    contents, _, _ = verdict.read(H200 / "3ff6e58" / f"{name}.json" for name in FIRST)
    records = Records(contents)
    rows = {row[0]: row[1:] for row in verdict.lines(records)}
    assert rows["captured, beyond the bare kernel"][-1] == "not fit"
    assert rows["against Triton"][1:] == ("0.99x", "vit_l16, triton", "MISSED")
    unfit = {(r["provider"], r["case"]) for r, _ in records.unfit if r["provider"] != CAPTURED}
    assert unfit == {(PLAN, "medium"), ("fused_ema", "medium")}


# ---- builds in turn


def line(variant, speed, case="single", op="update", pair=F32):
    return {"variant": variant, "case": case, "op": op, "pair": pair, "gb_per_s": speed}


CHOSEN = {"title": "one tensor", "case": "single", "op": "update", "pair": F32, "build": "b"}


def test_builds_in_turn_are_held_against_the_one_before():
    first = [line("before", 1000), line("b", 1170), line("triton", 1000), line("c", 9)]
    first += [line("torch flat lerp_", 2000), line("torch flat copy_", 5)]
    assert verdict.builds([CHOSEN], [first]).rows == (
        ("one tensor", "update", "fp32/fp32", "1,000", "1,170", "+17 %", "0.585", "1.17x"),
    )
    # The last run that has both counts, and no figure of another one.
    runs = [first, [line("before", 1000), line("b", 990), line("triton", 1000)], [line("b", 7)]]
    assert verdict.builds([CHOSEN], runs).rows == (
        ("one tensor", "update", "fp32/fp32", "1,000", "990", "**-1.0 %**", "", "**0.99x**"),
    )
    with pytest.raises(ValueError, match="no run of 'b' and 'before' on single update"):
        verdict.builds([CHOSEN], [[line("before", 1), line("b", 1, pair=MIXED)]])


def test_builds_and_those_chosen_need_each_other(tmp_path, capsys):
    (tmp_path / "chosen.json").write_text(json.dumps({"chosen": [CHOSEN]}))
    (tmp_path / "run.jsonl").write_text(json.dumps(line("before", 1)))
    for name in ("chosen.json", "run.jsonl"):
        with pytest.raises(SystemExit):
            cli.main(["verdict", str(tmp_path / name)])
        assert "builds in turn need both" in capsys.readouterr().err


# ---- the figures of README and docs/performance.md are those of the records


FIRST_TABLE = "| list | op | ema/param | GB/s | naive"
UPDATE_FP32 = ("update", "fp32/fp32")


def rows_of(page, headers):
    """The rows of the table whose first line begins so, each a list of cells."""
    text = (ROOT / page).read_text()
    table = text[text.index(headers) :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()]
    return rows[2:]


def test_the_table_of_the_walks():
    files = [str(H200 / "walks" / name) for name in ("chosen.json", "first.jsonl", "second.jsonl")]
    _, chosen, runs = verdict.read(map(Path, files))
    assert len(chosen) == 12
    made = verdict.markdown(verdict.builds(chosen, runs)).splitlines()
    start = "| list | op | ema/param | GB/s before |"
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text[text.index(start) :].partition("\n\n")[0].splitlines() == made


def test_the_picture_of_records_from_before_there_were_pauses(tmp_path):
    pytest.importorskip("matplotlib")
    files = [str(H200 / "3ff6e58" / f"{name}.json") for name in ("bench", "bench_mixed")]
    cli.main(["verdict", *files, "--plot", str(tmp_path / "update")])
    texts = (tmp_path / "update.svg").read_text()
    # Text is drawn as shapes; what it says stands beside them.
    assert "<!-- ViT-L/16 -->" in texts
    # A list of small tensors shows its time: 6.8 us of the plan in that record.
    assert "<!-- 6.8 us -->" in texts
    assert "<!-- 19.2x -->" in texts


def test_the_tables_of_the_gpu():
    contents, _, _ = verdict.read(H200 / "3ff6e58" / f"{name}.json" for name in FIRST)
    records = Records(contents)
    made = {}
    for title, done, pair, *cells in verdict.summary(records).rows:
        short = "/".join(verdict._SHORT[dtype] for dtype in pair.split("/"))
        made.setdefault((title, done, short), cells)  # ResNet-50's first: compile.json has others.
    targets = {row[0]: row[2] for row in verdict.lines(records)}
    seen = 0
    for title, done, pair, speed, *factors in rows_of("docs/performance.md", FIRST_TABLE):
        if title == "10,000 x 64, with the host's part":
            expected = ["", targets["10,000 x 64 end to end, against foreach"], "", ""]
        else:
            title = title.removesuffix(", on the device").removesuffix(" of 2^26 elements")
            wanted_speed, _, *expected = made[title, done, pair]
            assert speed == wanted_speed, title
        for told, value in zip(factors, expected, strict=False):
            figure = re.fullmatch(r"(\*\*)?([\d.]+)x(?:\*\*)?", told) if told else None
            if figure is None:
                assert not told, told
                continue
            digits = len(figure[2].partition(".")[2])
            # The summary has two digits, and half a unit of the last may have gone either way.
            assert abs(float(value[:-1]) - float(figure[2])) <= 0.5 * 10**-digits + 0.005, title
            assert (figure[1] is not None) == (float(value[:-1]) < 1), title
            seen += 1
    assert seen > 40


def test_the_readme_shows_rows_of_that_table():
    rows = rows_of("docs/performance.md", FIRST_TABLE)
    updates = {title: cells for title, op, pair, *cells in rows if (op, pair) == UPDATE_FP32}
    shown = rows_of("README.md", "| list | GB/s | naive loop |")
    assert len(shown) >= 5
    for title, *cells in shown:
        assert cells == updates[title], title
