"""The model card and its upload: read back by the Hub's own client, honest, and never of a broken export."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.utils import filter_repo_objects
from test_evaluate import text_rows

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.errors import CheckError, InputError
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.recipes.quantize import Quantizing, quantize
from moesaic.report import Facts, Naming, card, gather, push, report, uploads, write_card
from moesaic.report.card import eval_results, licence_files
from moesaic.serve.vllm.base import VERSION

FRONT = """---
license: other
license_name: minimax-m2
license_link: LICENSE
language: [en, zh]
pipeline_tag: text-generation
---
# A model
"""
NAMING = Naming("MiniMaxAI/MiniMax-M2", "me/M2-MXFP4")


@pytest.fixture(scope="module")
def source(m2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny M2 as a release: with a licence and a card of its own."""
    folder = tmp_path_factory.mktemp("card") / "source"
    shutil.copytree(m2.path, folder)
    (folder / "LICENSE").write_text("You may read this.\n")
    (folder / "README.md").write_text(FRONT)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def export(source: Checkpoint) -> Path:
    """Its experts in MXFP4, evaluated, with a report."""
    out = source.path.parent / "out"
    quantize(source.path, out, Quantizing("mxfp4"), quiet=True, command="moesaic quantize A B --format mxfp4")
    evaluate(
        source,
        Checkpoint.open(out),
        [Reading.of(text_rows(source))],
        out / "moesaic",
        Conditions(device="cpu"),
        quiet=True,
    )
    report(out)
    return out


@pytest.fixture(scope="module")
def facts(export: Path) -> Facts:
    return gather(export)


def test_the_hub_reads_the_front_matter(facts: Facts) -> None:
    text = card(facts, NAMING)
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    told = data.to_dict()
    assert told["base_model"] == "MiniMaxAI/MiniMax-M2" and told["base_model_relation"] == "quantized"
    assert (told["license"], told["license_name"], told["license_link"]) == ("other", "minimax-m2", "LICENSE")
    assert told["language"] == ["en", "zh"] and told["library_name"] == "transformers"
    assert {"moe", "compressed-tensors", "mxfp4"} <= set(told["tags"]) and "expert-pruning" not in told["tags"]
    assert data.model_name == "M2-MXFP4" and facts.scores is not None
    found = {r.metric_type: r.metric_value for r in data.eval_results or []}
    for metric, name in {
        "kl_divergence": "kl_mean",
        "perplexity": "ppl_export",
        "top1_agreement": "top1_agreement",
    }.items():
        score = facts.scores.find(name)
        assert score is not None and found[metric] == pytest.approx(score.value)


def test_the_body_says_what_was_measured_and_how_to_serve(facts: Facts) -> None:
    text = card(facts, NAMING)
    assert "moesaic quantize A B --format mxfp4" in text and f"With vLLM {VERSION}" in text
    assert "holds for this one too" in text and "[LICENSE](LICENSE)" in text and "activations were not rounded" in text
    assert "Not measured: " in text and "long context" in text and "has not been verified" not in text
    command = re.search(r"```\n(vllm serve .*?)\n```", text, re.S)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", "me/M2-MXFP4"]
    assert words[words.index("--served-model-name") + 1] == "M2-MXFP4"
    for line in re.findall(r"^\|.*\|$", text, re.M):
        assert "None" not in line and "nan" not in line
    unmeasured = card(replace(facts, scores=None, verify=None), NAMING)
    assert "Do not take this model for as good" in unmeasured and "has not been verified" in unmeasured


def test_nvfp4_experts_come_with_a_warning_of_transformers(facts: Facts) -> None:
    assert facts.after is not None and "second scale" not in card(facts, NAMING)
    after = {**facts.after, "formats": {**facts.after["formats"], "experts": {"nvfp4": 12}}}
    assert "leaves out the second scale" in card(replace(facts, after=after), NAMING)


def test_no_card_without_a_licence_unless_told(facts: Facts, tmp_path: Path) -> None:
    assert facts.model is not None
    bare = tmp_path / "bare"
    shutil.copytree(facts.model, bare, ignore=shutil.ignore_patterns("LICENSE"))
    without = replace(facts, model=bare)
    with pytest.raises(InputError, match="no licence file"):
        card(without, NAMING)
    assert "came without a licence file" in card(without, replace(NAMING, unlicensed=True))
    (bare / "NOTICE").write_text("x")
    with pytest.raises(InputError, match="no licence file"):
        card(without, NAMING)  # a notice gives nobody a right
    (bare / "LICENSE-MODEL").write_text("x")
    assert licence_files(bare) == ["LICENSE-MODEL", "NOTICE"]


def test_the_base_is_named_or_the_hub_s_own_cache(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--base-model"):
        card(facts, replace(NAMING, base_model=""))
    with pytest.raises(InputError, match="--base-model"):
        card(facts, replace(NAMING, base_model="M2"))
    cached = {**facts.source, "model": str(tmp_path / "models--MiniMaxAI--MiniMax-M2.7" / "snapshots" / "0123")}
    text = card(replace(facts, source=cached), replace(NAMING, base_model=""))
    assert ModelCard(text).data.to_dict()["base_model"] == "MiniMaxAI/MiniMax-M2.7"


def test_results_of_the_hub_s_benchmarks_alone_have_files(facts: Facts) -> None:
    assert facts.scores is not None
    like = facts.scores.scores[0]
    marks = [
        replace(like, name="task_acc_export", reading=task, value=0.412, rows=198)
        for task in ("mine", "gpqa_diamond_zeroshot")
    ]
    asked = {**facts.scores.facts, "tasks": {"harness": "lm-eval 0.4.13", "folder": None}}
    scores = replace(facts.scores, scores=(*facts.scores.scores, *marks), facts=asked)
    files = eval_results(replace(facts, scores=scores))
    assert list(files) == [".eval_results/gpqa_diamond_zeroshot.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(*files.values()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("Idavidrein/gpqa", "gpqa_diamond", 0.412)
    for folder in ({"folder": "mine/"}, {}):  # a file of that name from elsewhere is no such benchmark
        own = {**facts.scores.facts, "tasks": {"harness": "lm-eval 0.4.13", **folder}}
        assert eval_results(replace(facts, scores=replace(scores, facts=own))) == {}
    assert eval_results(facts) == {}


class Recorder:
    """Stands where huggingface_hub's HfApi does, since no Hub is here: keeps what it was asked to upload."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.private: bool | None = None
        self.files: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(f"create {repo_id}")
        self.private = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        inside = [str(f.relative_to(folder_path)) for f in sorted(folder_path.rglob("*")) if f.is_file()]
        self.calls.append("folder")
        self.files += filter_repo_objects(inside, allow_patterns=allow_patterns)

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        self.calls.append("commit")
        self.files += [operation.path_in_repo for operation in operations]


def test_weights_go_up_first_and_the_card_last(facts: Facts) -> None:
    write_card(facts, NAMING)
    files, api = uploads(facts), Recorder()
    assert facts.model is not None
    address = push(facts, "me/M2-MXFP4", files, False, api, quiet=True)
    assert address == "https://huggingface.co/me/M2-MXFP4"
    assert api.calls == ["create me/M2-MXFP4", "folder", "commit"] and api.private
    assert api.files == [f.to for f in files] and api.files[-1] == "README.md"
    there = {str(f.relative_to(facts.model)) for f in facts.model.rglob("*.safetensors") if f.parent == facts.model}
    assert there <= set(api.files) and {"LICENSE", "config.json", "tokenizer.json", "moesaic/plan.json"} <= set(
        api.files
    )
    assert {"moesaic/report.html", "moesaic/scores.json", "moesaic/scores.csv"} <= set(api.files)
    assert "moesaic/scores.safetensors" not in api.files and len(api.files) == len(set(api.files))


def test_an_export_that_does_not_verify_stays_here(source: Checkpoint, facts: Facts, tmp_path: Path) -> None:
    assert facts.model is not None
    broken = tmp_path / "broken"
    shutil.copytree(facts.model, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0x3F
    shard.write_bytes(data)
    api, there = Recorder(), gather(broken)
    with pytest.raises(CheckError, match="nothing was uploaded"):
        push(there, "me/M2-MXFP4", uploads(there), False, api, quiet=True)
    assert api.calls == []
    with pytest.raises(InputError, match="names no owner"):
        push(facts, "M2", [], False, api, quiet=True)


def test_a_hub_that_is_not_there_is_one_sentence(facts: Facts) -> None:
    write_card(facts, NAMING)
    nobody = HfApi(endpoint="http://127.0.0.1:9", token="none")
    with pytest.raises(InputError, match="the Hub did not take me/M2-MXFP4"):
        push(facts, "me/M2-MXFP4", uploads(facts), False, nobody, quiet=True)


def test_pushing_is_a_dry_run_unless_told(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["report", str(export), "--push", "me/M2-MXFP4", "--base-model", "MiniMaxAI/MiniMax-M2", "--quiet"]
    assert main(call) == 0
    told = capsys.readouterr().out
    assert "nothing was uploaded" in told and "--yes" in told and "model.safetensors.index.json" in told
    total = sum(f.bytes for f in uploads(gather(export)))
    assert f"{total / 1e6:,.2f} MB" in told and (export / "README.md").read_text().startswith("---\nbase_model:")
