"""Images in calibration: what is seen of them against transformers' own model, and whose tokens are counted where."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from reference import Reference

from moesaic.calibrate import Statistics, calibrate
from moesaic.cli import main
from moesaic.data.corpus import Corpus
from moesaic.data.images import Sight, fitted, pictured
from moesaic.data.texts import read_texts
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import FamilyError, InputError
from moesaic.families import FAMILIES

VISION = FAMILIES["minimax_m3_vl"].vision


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples with images of 4 and 8 tokens, and others of text alone."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i, size in enumerate([(56, 56), (112, 56), (56, 56), (60, 110)]):
        picture(*size, seed=i).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": f"sample {i}: a picture of noise, and what is to be said of it"})
    lines += [{"text": f"no picture in {i}, but words enough for a row of text, and for some more"} for i in range(20)]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize(
    "size, wanted",
    [
        ((56, 56), (56, 56)),
        ((100, 50), (112, 56)),  # to the nearest 28
        ((2016, 2016), (672, 672)),  # too large: a third of each side
        ((20, 20), (56, 56)),  # too small: 2.8 times each side
        ((28, 1000), (28, 1008)),
    ],
)
def test_the_size_that_an_image_gets(size, wanted):
    assert fitted(*size, 28, VISION) == wanted


def test_patches_that_will_be_merged_lie_side_by_side(m3):
    """56 × 112 pixels are 4 × 8 patches of 14: the first four are the corner of 2 × 2."""
    image = picture(56, 112)
    patches_NP, grid = Sight(m3).patches(image)
    assert grid == (4, 8) and patches_NP.shape == (32, 3 * 2 * 14 * 14)
    x_HWC = (np.asarray(image) / 255 - VISION.mean) / VISION.std
    for n, (row, column) in {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1), 4: (0, 2), 16: (2, 0), 31: (3, 7)}.items():
        part = x_HWC[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)
        found = patches_NP[n].reshape(3, 2, 14, 14)
        for frame in (0, 1):  # a still image fills both frames
            assert found[:, frame].numpy() == pytest.approx(part, abs=1e-6)


def test_what_is_seen_is_what_transformers_sees(m3):
    """Its own loader fills its own whole model, in BF16, as all but the patch embedding is on disk."""
    sight, image = Sight(m3), picture(84, 56)
    patches_NP, grid = sight.patches(image)
    model = transformers.AutoModelForImageTextToText.from_pretrained(m3.path).float().eval()
    with torch.no_grad():
        wanted = model.model.get_image_features(patches_NP, torch.tensor([[1, *grid]])).pooler_output[0]
    found = sight.features(image)
    assert found.shape == (6, m3.architecture.hidden) and torch.allclose(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(sight.features(picture(84, 56, seed=1)), wanted, atol=1e-5, rtol=0)


def test_experts_of_image_tokens_are_counted_apart(m3, data, tmp_path):
    """Routing redone from what the transformers model feeds its routers when given the very embeddings."""
    found = pictured(m3, Corpus(data, tokens=384, length=32))
    ids_BT, vocab, a = found.tokens.ids_BT, m3.architecture.vocab, m3.architecture
    image_BT = ids_BT >= vocab
    assert found.tokens.domains == ("mixed", "image") and found.tokens.facts["images"] == 4
    s = calibrate(m3, found.tokens, tmp_path / "stats", quiet=True, seen=found.seen)
    reference, entering = Reference(m3.path), {}
    embeds_BTD = torch.nn.functional.embedding(ids_BT.masked_fill(image_BT, 0), reference.model.embed_tokens.weight)
    ranges = {first: range(first, first + len(rows)) for first, rows in found.seen.items()}
    for b, t in image_BT.nonzero().tolist():
        first = next(first for first, ids in ranges.items() if int(ids_BT[b, t]) in ids)
        embeds_BTD[b, t] = found.seen[first][int(ids_BT[b, t]) - first]
    for layer in a.moe_layers:
        reference.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: entering.update({layer: args[0].detach().flatten(0, 1)})
        )
    with torch.no_grad():
        reference.model(inputs_embeds=embeds_BTD, use_cache=False)
    for at, layer in enumerate(a.moe_layers):
        router, bias = (reference.values[name] for name in a.routers[layer].tensors)
        chosen_Tk = (torch.sigmoid(entering[layer] @ router.T) + bias).topk(a.top_k).indices
        for domain, mine_T in (("image", image_BT.flatten()), ("mixed", ~image_BT.flatten())):
            wanted = chosen_Tk[mine_T].flatten().bincount(minlength=a.experts)
            assert s.totals({domain: 1.0})["tokens"][at].tolist() == wanted.tolist()
    assert s.positions_DH.sum(1).tolist() == [int((~image_BT).sum()), int(image_BT.sum())]


def test_the_same_image_has_the_same_ids_in_any_run(m3, data, tmp_path):
    corpus = Corpus(data, tokens=384, length=32)
    one, again = (pictured(m3, corpus) for _ in range(2))
    assert one.tokens.identity == again.tokens.identity and list(one.seen) == list(again.seen)
    for name in ("mixed.jsonl", "0.png", "1.png", "2.png", "3.png"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    picture(56, 56, seed=9).save(tmp_path / "0.png")
    other = pictured(m3, Corpus(tmp_path, tokens=384, length=32))
    assert other.tokens.identity != one.tokens.identity and len(set(other.seen) - set(one.seen)) == 1


def test_the_command_adds_them_as_a_domain(m3, data, tmp_path, capsys):
    words = ["calibrate", str(m3.path), str(tmp_path / "run"), "--data", str(data), "--tokens", "128", "--length", "32"]
    assert main([*words, "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["domains"] == ["mixed", "image"]
    loaded = Statistics.load(tmp_path / "run" / "stats", m3)
    assert loaded.totals({"image": 1.0})["tokens"].sum() > 0 and facts["tokens"] == loaded.tokens


def test_what_is_said_of_an_image_is_read_with_it_and_nowhere_else(m3, data, tmp_path):
    tokenizer = Tokenizer.open(m3.path)
    (mixed,) = read_texts(data, tokenizer)
    assert len(mixed.documents) == 20 and not any("sample" in d for d in mixed.documents)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    lines = [{"image": name, "text": "of this picture there is a lot to be said " * 9} for name in ("0.png", "1.png")]
    (tmp_path / "image.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "text.txt").write_text("words without a picture")
    assert [t.domain for t in read_texts(tmp_path, tokenizer)] == ["text"]
    found = pictured(m3, Corpus(tmp_path, tokens=64, length=32))
    assert found.tokens.domains == ("image",) and found.tokens.facts["images"] == 1  # a file of that name adds none


def test_samples_that_will_not_do(m2, m3, data, tmp_path):
    with pytest.raises(FamilyError, match="minimax_m2 sees no images; remove the samples that have one"):
        pictured(m2, Corpus(data, length=32))
    with pytest.raises(InputError, match="the samples with images in mixed fill no row of 2,048 tokens"):
        pictured(m3, Corpus(data, length=2048))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "torn.png", "text": "x" * 100}))
    (tmp_path / "torn.png").write_bytes((data / "0.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"torn\.png cannot be read as an image"):
        pictured(m3, Corpus(tmp_path, length=32))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "gone.png", "text": "x" * 100}))
    with pytest.raises(InputError, match=r"a\.jsonl line 1 names the image .gone\.png., and .* cannot be read"):
        pictured(m3, Corpus(tmp_path, length=32))
    with pytest.raises(InputError, match="holds images alone; wanted some text beside them"):
        read_texts(tmp_path, Tokenizer.open(m3.path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 100}))
    assert pictured(m3, Corpus(tmp_path, length=32)) is None
