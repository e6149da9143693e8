"""The GPU sheet without a GPU: every phase by the emulator, the form of the committed sheets, the driver's limits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile

import cuda_ledger
import pytest
from pyops._bench import gpu_sheet, harness

ROOT = cuda_ledger.ROOT
SCRIPT = ROOT / "bench" / "gpu_sheet.py"


@pytest.mark.emu
def test_dry_run(tmp_path):
    """All phases end well and the sheet has the form that a real one must have."""
    if not (ROOT / "pyops" / "_emulated.so").exists():
        pytest.skip("the emulation was not built (PYOPS_EMULATION=ON)")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--dry-run", "--budget", "400"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sheet = json.loads((tmp_path / "emulated.json").read_text())
    assert gpu_sheet.check_sheet(sheet) == []
    assert {phase["result"] for phase in sheet["phases"].values()} == {"ok"}
    assert sheet["not_run"] == []
    for counts in (sheet["probes"], sheet["tests"]["cuda"]):
        assert counts["passed"] > 5
        assert counts["failed"] == 0
    assert [one["result"] for one in sheet["sanitizer"]] == ["0 errors"]
    assert {row["op"] for row in sheet["rows"]} == {case.op for case in harness.device_cases()}
    assert all(row["backend"] == "cuda" and row["peers"] and row["err"] < 0.02 for row in sheet["rows"])
    assert any(counted["sectors"] > 0 for counted in sheet["counters"])
    assert all(value > 0 for value in sheet["ceilings"].values())
    text = (tmp_path / "emulated.md").read_text()
    assert text.count("\n| ") >= len(sheet["rows"])
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert set(archive.getnames()) == {f"{phase}.log" for phase in gpu_sheet.PHASES}
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_phase_out_of_time_leaves_what_it_found(tmp_path):
    """Killed with all that it started; a half-written line is passed over."""
    script = """if True:
        import subprocess, sys, time
        with open(sys.argv[1], "w") as file:
            file.write('{"not_run": 1}\\n{"not_run": 2}\\n{"not_r')
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    """
    findings = tmp_path / "findings"
    command = [sys.executable, "-c", script, str(findings)]
    assert gpu_sheet.run_limited(command, 3, tmp_path / "log", {}) == "out of time"
    sheet = gpu_sheet.empty_sheet("")
    gpu_sheet.merge(sheet, findings)
    assert sheet["not_run"] == [1, 2]
    assert gpu_sheet.run_limited([sys.executable, "-c", "exit(3)"], 60, tmp_path / "log", {}) == "failed (3)"


def test_a_failing_phase_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    """Its log is printed, it counts as not run, and the exit code says so."""
    monkeypatch.setattr(gpu_sheet, "PHASES", {"none": 60, "env": 60})
    monkeypatch.setattr(sys, "argv", ["gpu_sheet.py", "--out", str(tmp_path), "--dry-run", "--phases", "none,env"])
    assert gpu_sheet.main() == 1
    sheet = json.loads((tmp_path / "emulated.json").read_text())
    assert sheet["phases"]["none"]["result"].startswith("failed")
    assert sheet["phases"]["env"]["result"] == "ok"
    assert "phase none" in sheet["not_run"][0]
    assert "phase_none" in capsys.readouterr().out


def test_an_interrupted_test_run_reports_what_it_had(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_first(): pass\ndef test_second(): assert 0\ndef test_third(): time.sleep(600)\n"
    )
    for seconds in (18, 90):  # the second where starting pytest alone takes longer than the first
        found = gpu_sheet.run_pytest([str(tmp_path / "test_slow.py"), "--rootdir", str(tmp_path)], seconds)
        if found["failures"]:
            break
    assert (found["passed"], found["failures"]) == (1, ["test_second"])
    assert found["result"].startswith("interrupted")


def test_reading_the_profiler():
    """Its table starts after messages, has a line per launch and metric, and may be cut off."""
    table = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","moments_kernel<bfloat16>","dram__bytes.sum","byte","537,001,984"
"0","7","moments_kernel<bfloat16>","lts__t_sectors_op_read.sum","sector","16777216"
"1","7","finish_kernel","dram__bytes.sum","byte","n/a"
"1","7","fini"""
    assert gpu_sheet.read_ncu(table) == [
        {"kernel": "moments_kernel<bfloat16>", "DRAM bytes": 537001984.0, "L2 sectors read": 16777216.0},
        {"kernel": "finish_kernel"},
    ]
    assert gpu_sheet.read_ncu("==ERROR== no permission") == []


def test_a_row_measured_again_replaces_the_first(tmp_path):
    row = dict.fromkeys(gpu_sheet.ROW_KEYS, 0) | {"op": "z_loss", "ms_median": 2}
    findings = gpu_sheet.Findings(tmp_path / "findings")
    for found in ({"rows": row}, {"rows": row | {"op": "cross_entropy"}}, {"rows": row | {"ms_median": 1}}):
        findings.add(**found)
    findings.add(tests={"cuda": 1})
    findings.add(tests={"triton": 2}, not_run="this")
    sheet = gpu_sheet.empty_sheet("")
    gpu_sheet.merge(sheet, tmp_path / "findings")
    assert [(one["op"], one["ms_median"]) for one in sheet["rows"]] == [("cross_entropy", 2), ("z_loss", 1)]
    assert sheet["tests"] == {"cuda": 1, "triton": 2}
    assert sheet["not_run"] == ["this"]


def test_wrong_results_are_not_timed():
    """A row whose error is far above that of its rivals is an error, not a number."""
    case = next(case for case in harness.device_cases(tiny=True) if case.op == "z_loss")
    device = gpu_sheet.Emulated()

    def build(*arguments):
        prepared = case.build(*arguments)
        right = prepared.target.run
        prepared.target.run = lambda argument: right(argument) * 1.05
        return prepared

    row = gpu_sheet.measure(case, device, (1.0, 1.0), {})
    assert not [key for key in gpu_sheet.ROW_KEYS if key not in row]
    with pytest.raises(RuntimeError, match="wrong result"):
        gpu_sheet.measure(dataclasses.replace(case, build=build), device, (1.0, 1.0), {})


def test_committed_sheets():
    """Form, and rows of commits that this tree descends from."""
    sheets = sorted((ROOT / "bench" / "results").glob("*.json"))
    for path in sheets:
        sheet = json.loads(path.read_text())
        assert gpu_sheet.check_sheet(sheet) == [], path.name
        for commit in {row["commit"] for row in sheet["rows"]}:
            command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commit, "HEAD"]
            assert subprocess.run(command).returncode == 0, f"{path.name}: {commit}"


def test_unknown_phases_are_rejected(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_sheet.py", "--out", "x", "--phases", "env,bnech"])
    with pytest.raises(SystemExit):
        gpu_sheet.main()
    assert "unknown phase 'bnech'" in capsys.readouterr().err
