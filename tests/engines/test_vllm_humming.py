"""auto-round's 2 and 3 bits in stock vLLM, which leaves them to humming: built, filled, decoded as all others (test_vllm.py).

Needs `--vllm-python PATH` of an environment with humming-kernels, and the load check of ../shared. Kernels would
need CUDA, so nothing is multiplied.
"""

from pathlib import Path

import loads
import pytest
from test_vllm import CHECK, Case, checked, export, faults, name_of, outcome

pytestmark = pytest.mark.engines
SIDE = Path(__file__).with_name("vllm_humming.py")
CASES: list[Case] = [
    ("auto_round", "m2", ["int3_g64", "int2_g32"], "int4_g64"),
    ("auto_round", "m2", ["int2_g128", "int8_g64"], "bf16"),
    ("auto_round", "m3", ["int3_g64", "int2_g32"], "bf16"),
    ("auto_round", "m3", ["int2_g128", "int4_g64"], "int4_g128"),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_vllm_loads_few_bits(
    case: Case, request: pytest.FixtureRequest, tmp_path: Path, record_property: loads.Record
) -> None:
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    humming = Path(python).parents[1] / "humming"
    if missing := [p for p in (CHECK, humming) if not p.exists()]:
        pytest.skip(f"{missing[0]} is not there, so vLLM cannot load 2 and 3 bits")
    container, family, experts, rest = case
    out = export(tmp_path / "out", request.getfixturevalue(family), case)
    (report,) = checked(python, [out], tmp_path / "report.json", (SIDE, CHECK), humming, CHECK.parent).values()
    unread = {name for name in report.get("unfilled", {}) if name.endswith("_g_idx")}  # for activation order alone
    found = faults(report) | {"unfilled": sorted(set(report.get("unfilled", ())) - unread)}
    assert not any(found.values()), found
    assert report["tensors"] > 0 and report["decoded_layers"] > 0
    assert "HummingMoEMethod" in report["methods"].values()
    loads.note(record_property, "vLLM 0.32", family, container, experts, rest, outcome(case))
