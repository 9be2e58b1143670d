"""`klas-hf doctor`: every finding from configurations, tokenizers, cards and headers; no weight is read."""

import json
import re
import resource
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_with_tokenizer, tiny_model
from tiny_vision import tiny_classifier
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    ViTImageProcessorPil,
)

from klas_hf import StitchedModel, measure_costs
from klas_hf.cli import main
from klas_hf.cli.examination import examine_anchors
from klas_hf.cli.findings import Examination

CHAT = "{{ messages[0]['content'] }}"


@pytest.fixture
def texts(language: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the two language models, to be changed."""
    return _copied(language, tmp_path)


@pytest.fixture
def pictures(vision: Path, tmp_path: Path) -> tuple[Path, Path]:
    return _copied(vision, tmp_path)


def _copied(folder: Path, to: Path) -> tuple[Path, Path]:
    return tuple(shutil.copytree(folder / name, to / name) for name in ("small", "large"))  # type: ignore[return-value]


def _edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def _levels(found: Examination) -> dict[str, str]:
    return {finding.subject: finding.level for finding in found.findings}


def _only(found: Examination, level: str) -> str:
    """The text of the only finding of this level."""
    (finding,) = [one for one in found.findings if one.level == level]
    return f"{finding.subject}: {finding.found} {finding.remedy}"


# --- a pair without a problem ---


def test_everything_is_looked_at_in_two_language_models(texts: tuple[Path, Path]) -> None:
    found = examine_anchors(*map(str, texts), stitch=(2, 3))
    assert found.ok
    assert list(dict.fromkeys(finding.subject for finding in found.findings)) == [
        "kind", "vocabulary", "tokenizer", "special tokens", "end of sequence", "chat template", "RoPE", "context",
        "KV cache", "embeddings", "blocks", "costs", "direction", "stitch", "licence", "weights", "dtype", "reading",
        "memory",
    ]  # fmt: skip
    assert "100.0" in found.of("RoPE")[0].found and "10.0" in found.of("RoPE")[0].found
    assert "source untied, target tied" in found.of("embeddings")[0].found
    assert "1 KV heads 8 wide → 2 KV heads 16 wide: no continuous batching" in found.of("KV cache")[0].found
    for name in texts:
        cost = measure_costs(AutoConfig.from_pretrained(name))
        assert f"{cost.parameters / 1000:.3g} k parameters" in found.of("costs")[0].found


def test_everything_is_looked_at_in_two_classifiers(pictures: tuple[Path, Path]) -> None:
    found = examine_anchors(*map(str, pictures), stitch=(1, 2))
    assert found.ok
    assert [finding.subject for finding in found.findings] == [
        "kind", "labels", "image size", "processing", "blocks", "costs", "direction", "stitch", "licence", "weights",
        "dtype", "reading", "memory",
    ]  # fmt: skip
    assert "source blocks 1–2: 4×4; target blocks 1–3: 4×4; 4 stitches" in found.of("blocks")[0].found
    assert examine_anchors(*map(str, pictures)).readings == ()


@pytest.mark.parametrize("pair", ["texts", "pictures"])
def test_what_is_said_to_be_read_is_what_the_stitched_model_holds(pair: str, request: pytest.FixtureRequest) -> None:
    names = request.getfixturevalue(pair)
    auto = AutoModelForCausalLM if pair == "texts" else None
    for name in names:  # in many files
        model = auto.from_pretrained(name) if auto else _classifier(name)
        (name / "model.safetensors").unlink()
        model.save_pretrained(name, max_shard_size="12KB")
    found = examine_anchors(*map(str, names), stitch=(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stitched = StitchedModel.from_anchors(*names, (1, 2))
    taken = {name: tensor for name, tensor in stitched.state_dict().items() if "joints" not in name}
    for reading, name in zip(found.readings, names, strict=True):
        shards = {path.name: load_file(path) for path in name.glob("*.safetensors")}
        holds = {file: [x for x in shard.values() if _is_among(x, taken)] for file, shard in shards.items()}
        assert set(reading.files) == {file for file, tensors in holds.items() if tensors}
        assert reading.tensors == sum(map(len, holds.values()))
        assert reading.bytes == sum(4 * x.numel() for tensors in holds.values() for x in tensors)
        assert len(reading.files) < reading.all_files == len(shards)
    assert sum(reading.tensors for reading in found.readings) == len(taken)
    parameters = sum(parameter.numel() for parameter in stitched.parameters())
    assert found.memory == {"float32": 4 * parameters, "bfloat16": 2 * parameters}


def _classifier(name: Path) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(name)


def _is_among(tensor: torch.Tensor, taken: dict[str, torch.Tensor]) -> bool:
    return any(one.shape == tensor.shape and torch.equal(one, tensor) for one in taken.values())


def test_no_weight_is_read_and_no_model_allocated(tmp_path: Path) -> None:
    """Llama 3.2 1B and 3B by their shapes, in sparse files of 2.5 and 6.4 GB."""
    common = dict(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16")
    shapes = {
        "1b": LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            head_dim=64,
            **common,
        ),
        "3b": LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            head_dim=128,
            **common,
        ),
    }
    for name, config in shapes.items():
        config.save_pretrained(tmp_path / name)
        _hollow(config, tmp_path / name / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = examine_anchors(str(tmp_path / "1b"), str(tmp_path / "3b"), stitch=(8, 14))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.ok and grown < 500e6
    assert "source 1.24 G parameters" in found.of("costs")[0].found
    assert "target 3.21 G parameters" in found.of("costs")[0].found
    assert "source 2.5 GB in 1 file, target 6.4 GB in 1 file" in found.of("weights")[0].found
    block = 3072 * 128 * (24 * 2 + 8 * 2) + 3 * 3072 * 8192 + 2 * 3072
    assert found.readings[1].bytes == 2 * (14 * block + 3072 + 128256 * 3072)


def _hollow(config: LlamaConfig, path: Path) -> None:
    """A safetensors file with the header of a model, and a hole where the tensors should be."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        if name != "lm_head.weight":
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


# --- language models: what can be wrong ---


def _other_words(source: Path, target: Path) -> None:
    save_with_tokenizer(tiny_model("llama"), source, words=["word1", "word0"])


def _other_size(source: Path, target: Path) -> None:
    shutil.rmtree(source)
    tiny_model("llama", vocab_size=60).save_pretrained(source)


def _pickled(source: Path, target: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _truncated(source: Path, target: Path) -> None:
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _reversed(source: Path, target: Path) -> None:
    source.rename(source.with_name("other"))
    target.rename(source)
    source.with_name("other").rename(target)


def _gpt2(source: Path, target: Path) -> None:
    shutil.rmtree(source)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=67)).save_pretrained(source)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_words, "vocabulary: got vocabularies that differ in 2 tokens"),
        (_other_size, "vocabulary: got vocabularies of 60 and 67 entries"),
        (_pickled, "weights: .*never pickled ones"),
        (_truncated, "weights: .*damaged"),
        (_reversed, "direction: .*reversed.* Swap source and target"),
        (_gpt2, "kind: got an anchor of type 'gpt2', which adds position embeddings"),
    ],
)
def test_problems_of_language_models(
    change: Callable[[Path, Path], None], expected: str, texts: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    change(*texts)
    found = examine_anchors(*map(str, texts))
    assert not found.ok
    assert re.search(expected, _only(found, "problem"))
    assert main(["doctor", *map(str, texts)]) == 1
    assert "\n1 problem, " in capsys.readouterr().out


def test_a_source_of_larger_blocks_is_reversed_even_where_it_costs_fewer_macs(tmp_path: Path) -> None:
    """A mixture of experts costs few of its parameters."""
    save_with_tokenizer(tiny_model("mixtral", num_local_experts=64), tmp_path / "small")
    save_with_tokenizer(tiny_model("llama", large=True), tmp_path / "large")
    found = examine_anchors(str(tmp_path / "small"), str(tmp_path / "large"))
    assert "direction: reversed: the source's blocks have" in _only(found, "problem")
    with pytest.raises(ValueError, match="reversed"):
        StitchedModel.from_anchors(tmp_path / "small", tmp_path / "large", (1, 1))


def test_a_stitch_out_of_range_is_a_problem(texts: tuple[Path, Path]) -> None:
    found = examine_anchors(*map(str, texts), stitch=(4, 1))
    assert "stitch: got stitch (4, 1), out of range" in _only(found, "problem")
    assert found.readings == ()


def test_anchors_of_two_kinds(texts: tuple[Path, Path], vision: Path) -> None:
    found = examine_anchors(str(texts[0]), str(vision / "large"))
    assert "kind: the source is a language model, the target an image classifier" in _only(found, "problem")


def _no_tokenizer(source: Path, target: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


def _lowercase(source: Path, target: Path) -> None:
    from tokenizers.normalizers import Lowercase

    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokenizer.normalizer = Lowercase()
    tokenizer.save(str(target / "tokenizer.json"))


def _special(source: Path, target: Path) -> None:
    _edit(target, bos_token_id=5)


def _wrong_bos(source: Path, target: Path) -> None:
    _edit(target, "tokenizer_config.json", bos_token="word9")


def _no_padding(source: Path, target: Path) -> None:
    for folder in (source, target):
        _edit(folder, pad_token_id=None)


def _eos_list(source: Path, target: Path) -> None:
    _edit(target, "generation_config.json", eos_token_id=[2, 7])


def _no_eos(source: Path, target: Path) -> None:
    for folder in (source, target):
        _edit(folder, eos_token_id=None)
        (folder / "generation_config.json").unlink()


def _template(*sides: int, text: str = CHAT) -> Callable[[Path, Path], None]:
    def change(*folders: Path) -> None:
        for side in sides:
            (folders[side] / "chat_template.jinja").write_text(f"{text}{side}")

    return change


def _context(source: Path, target: Path) -> None:
    _edit(source, max_position_embeddings=64)


def _dtype(source: Path, target: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)


def _licence(first: str, last: str) -> Callable[[Path, Path], None]:
    def change(source: Path, target: Path) -> None:
        for folder, licence in ((source, first), (target, last)):
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")

    return change


@pytest.mark.parametrize(
    ("change", "subject", "expected"),
    [
        (_no_tokenizer, "tokenizer", "none with the source"),
        (_lowercase, "tokenizer", "the anchors' differ in normalizer"),
        (_special, "special tokens", "bos_token_id 1 → 5"),
        (_wrong_bos, "special tokens", "the target's tokenizer has bos_token_id 9, not 1"),
        (_no_padding, "special tokens", "the target has no padding token"),
        (_eos_list, "end of sequence", "source [2], target [2, 7]"),
        (_no_eos, "end of sequence", "the target has no EOS token"),
        (_template(0), "chat template", "the source has one, the target none"),
        (_template(1), "chat template", "the target has one, the source none"),
        (_template(0, 1), "chat template", "the anchors' differ"),
        (_context, "context", "64 and 128 positions: the stitched model has 64"),
        (_dtype, "dtype", "source BF16, target F32"),
        (_licence("mit", "apache-2.0"), "licence", "source mit, target apache-2.0"),
        (_licence("llama3.2", "llama3.2"), "licence", "name the repository Llama-"),
    ],
)
def test_warnings_of_language_models(
    change: Callable[[Path, Path], None], subject: str, expected: str, texts: tuple[Path, Path]
) -> None:
    before = examine_anchors(*map(str, texts))
    change(*texts)
    found = examine_anchors(*map(str, texts))
    assert found.ok
    new = [one for one in found.of(subject) if one.level == "warning" and one not in before.findings]
    assert [one for one in new if expected in f"{one.found} {one.remedy}" and one.remedy]
    others = {one.subject for one in found.findings if one not in before.findings} - {subject}
    assert others <= {"special tokens", "vocabulary", "weights", "tokenizer"}  # what the change touches too


def test_what_agrees_is_fine(texts: tuple[Path, Path]) -> None:
    for folder in texts:
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        (folder / "chat_template.jinja").write_text(CHAT)
        _edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    levels = _levels(found := examine_anchors(*map(str, texts)))
    assert {name for name, level in levels.items() if level != "ok"} == {"KV cache"}
    assert found.of("licence")[0].found == "mit for both" and "equal" in found.of("chat template")[0].found
    assert "each side" not in found.of("RoPE")[0].found


def test_equal_key_value_shapes(tmp_path: Path) -> None:
    for name, large in (("small", False), ("large", True)):
        save_with_tokenizer(tiny_model("llama", large=large, head_dim=8, num_key_value_heads=2), tmp_path / name)
    found = examine_anchors(str(tmp_path / "small"), str(tmp_path / "large"))
    assert found.of("KV cache")[0].level == "ok" and "continuous batching" in found.of("KV cache")[0].found


# --- classifiers ---


def _labels(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    _edit(source, id2label=config["id2label"] | {"0": "asp"})


def _smaller_images(source: Path, target: Path) -> None:
    tiny_classifier("vit", image_size=16).float().save_pretrained(source)


def _other_mean(source: Path, target: Path) -> None:
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(source)


def _other_grid(source: Path, target: Path) -> None:
    tiny_classifier("vit", patch_size=16).float().save_pretrained(source)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_labels, "labels: .*class 0 as 'asp' and as 'ant'"),
        (_other_mean, "processing: .*normalises by mean"),
        (_other_grid, "blocks: .*no two lie on one grid"),
        (_reversed, "direction: .*reversed"),
    ],
)
def test_problems_of_classifiers(
    change: Callable[[Path, Path], None], expected: str, pictures: tuple[Path, Path]
) -> None:
    change(*pictures)
    assert re.search(expected, _only(examine_anchors(*map(str, pictures)), "problem"))


def test_image_sizes_that_differ_leave_costs_out(pictures: tuple[Path, Path]) -> None:
    _smaller_images(*pictures)
    levels = _levels(examine_anchors(*map(str, pictures), stitch=(1, 2)))
    assert levels["image size"] == levels["costs"] == "problem" and "reading" not in levels


def test_a_missing_image_processor_is_a_warning(pictures: tuple[Path, Path]) -> None:
    (pictures[0] / "preprocessor_config.json").unlink()
    found = examine_anchors(*map(str, pictures))
    assert found.ok and "no image processor" in found.of("processing")[0].found


def test_joinable_blocks_by_grid(tmp_path: Path) -> None:
    for name, large in (("small", False), ("large", True)):
        tiny_classifier("swin", large=large).float().save_pretrained(tmp_path / name)
    pair = str(tmp_path / "small"), str(tmp_path / "large")
    found = examine_anchors(*pair)
    text = found.of("blocks")[0].found
    assert "source blocks 1: 8×8, 2–3: 4×4; target blocks 1–2: 8×8, 3–4: 4×4" in text and "4 stitches" in text
    assert "i in 1–3, j in 1–3" in text
    across = examine_anchors(*pair, stitch=(1, 3))
    said = "stitch: got path 0[:1] 1[3:], whose joint 0[:1] → 1[3:] is from a grid of 8×8 to one of 4×4"
    assert said in _only(across, "problem")


# --- the command ---


def test_the_command_says_what_the_function_finds(texts: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    pair = list(map(str, texts))
    found = examine_anchors(*pair, stitch=(2, 3), tokens=16)
    assert main(["doctor", *pair, "--stitch", "2", "3", "--length", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    assert main(["doctor", *pair, "--stitch", "2", "3"]) == 0
    shown = capsys.readouterr().out
    assert all(finding.subject in shown for finding in found.findings)
    assert "0 problems, 2 warnings" in shown and max(map(len, shown.splitlines())) <= 100
    assert all(" ".join(one.remedy.split()) in " ".join(shown.split()) for one in found.findings)


def test_a_missing_anchor_is_bad_input(texts: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", str(texts[0]), "nowhere"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "could not load the anchor 'nowhere'" in captured.err
    assert "Traceback" not in captured.err
