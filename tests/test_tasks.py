"""tasks/: the harness's own Hugging Face backend on a whole model is the truth, McNemar and flips by hand."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forward import final
from reference import Reference
from test_evaluate import changed, noisy
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2ForCausalLM

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import InputError
from moesaic.evaluate import Conditions, evaluate
from moesaic.stream import LayerRun, State

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install moesaic[tasks]")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moesaic.evaluate.tasks import ask, mark
from moesaic.evaluate.tasks.marks import answers, mcnemar

CHOICE = """
task: squares
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["x"]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three local tasks over twelve documents of different lengths."""
    at = tmp_path / "tasks"
    at.mkdir()
    data = at / "data.jsonl"
    docs = [
        {
            "question": "so " * i + f"{i} times {i} is",
            "choices": [f" {i * i}", f" {i + i + 7}", " none of them"],
            "answer": i % 3,
        }
        for i in range(1, 13)
    ]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("squares", CHOICE), ("prose", ROLLING), ("writing", WRITING)):
        (at / f"{name}.yaml").write_text(text.format(data=data))
    return at


def much_noisier(name: str, stored: torch.Tensor) -> torch.Tensor:
    """Another head altogether, so that answers change."""
    if not name.startswith("lm_head"):
        return noisy(name, stored)
    return stored.roll(5, 0)


def backend(path: Path, tokenizer: Tokenizer, folder: Path, context: int) -> dict[str, Any]:
    """What the harness says of a whole transformers model."""
    reference = Reference(path)
    with torch.device("meta"):
        model = MiniMaxM2ForCausalLM(reference.model.config)
    model.model, model.lm_head.weight = reference.model, torch.nn.Parameter(reference.head_VD)
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer.chat, batch_size=1, max_length=context)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return dict(
        simple_evaluate(lm, tasks=["squares", "prose"], task_manager=manager, log_samples=True, bootstrap_iters=1)
    )


def test_equal_to_the_harnesss_own_backend(m2: Checkpoint, folder: Path, tmp_path: Path) -> None:
    tokenizer, export = Tokenizer.open(m2.path), changed(m2.path, tmp_path / "export", much_noisier)
    asked = ask(["squares", "prose"], tokenizer, vocab=m2.architecture.vocab, context=40, folder=folder)
    assert len(asked.readings) > 1 and len(asked.rows) == sum(len(r.ids_BT) for r in asked.readings)
    evaluate(m2, export, asked.readings, tmp_path, Conditions(floor=False, device="cpu"), quiet=True)
    scores, facts = mark(asked, tmp_path, ["none"])
    found = {(s.reading, s.name): s for s in scores}
    marks = []
    for path, model in ((m2.path, "source"), (export.path, "export")):
        theirs = backend(path, tokenizer, folder, 40)
        for metric in ("acc", "acc_norm"):
            ours = found["squares", f"task_{metric}_{model}"]
            wanted = theirs["results"]["squares"]
            assert (ours.value, ours.error) == pytest.approx(
                (wanted[f"{metric},none"], wanted[f"{metric}_stderr,none"])
            )
        marks.append([s["acc"] for s in sorted(theirs["samples"]["squares"], key=lambda s: s["doc_id"])])
    flips = sum(a != b for a, b in zip(*marks))
    assert found["squares", "task_acc_flips"].value == pytest.approx(flips / 12) and flips
    counts = facts["compared"]["squares none"]["acc"]
    assert counts["lost"] + counts["gained"] == flips and counts["documents"] == 12
    assert found["squares", "task_acc_mcnemar_p"].value == mcnemar(counts["lost"], counts["gained"])


def test_each_request_is_answered_as_by_the_harnesss_own_backend(m2: Checkpoint, folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(m2.path)
    asked = ask(["squares", "prose"], tokenizer, vocab=m2.architecture.vocab, context=40, folder=folder)
    evaluate(m2, m2, asked.readings, tmp_path, Conditions(floor=False, device="cpu"), quiet=True)
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    ours = asked.run(partial(answers, asked, values, "", "source"))
    theirs = backend(m2.path, tokenizer, folder, 40)
    for task in ("squares", "prose"):
        mine, wanted = (sorted(of["samples"][task], key=lambda s: s["doc_id"]) for of in (ours, theirs))
        assert len(mine) == 12
        for a, b in zip(mine, wanted):
            flat = [
                [float(x) for r in s["filtered_resps"] for x in (r if isinstance(r, tuple | list) else [r])]
                for s in (a, b)
            ]
            assert flat[0] == pytest.approx(flat[1], rel=1e-4, abs=1e-4)


def test_what_fills_a_row_up_is_not_seen(m3: Checkpoint) -> None:
    """Sparse attention included: rows alone and rows filled up with other ids end in the same hidden states."""
    ids_BT = torch.randint(300, (2, 150), generator=torch.Generator().manual_seed(0))
    run, ends = LayerRun(m3, "cpu"), []
    for rows_BT in (ids_BT[:, :120], ids_BT, torch.cat([ids_BT[:, :120], torch.zeros(2, 60, dtype=torch.long)], 1)):
        after = final(run, [State(run.embed(rows_BT))])
        ends.append(after[0].hidden_BTD[:, :120])
    assert torch.allclose(ends[0], ends[1], atol=1e-4) and torch.allclose(ends[0], ends[2], atol=1e-4)


def test_what_cannot_be_asked_is_refused(m2: Checkpoint, folder: Path) -> None:
    tokenizer = Tokenizer.open(m2.path)
    for name, message in (("writing", "generates text"), ("nothing", "unknown task 'nothing'")):
        with pytest.raises(InputError, match=message):
            ask([name], tokenizer, vocab=320, context=4096, folder=folder)


def test_mcnemar_by_hand() -> None:
    assert (mcnemar(0, 0), mcnemar(1, 1), mcnemar(5, 0)) == (1.0, 1.0, pytest.approx(2 / 32))
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
