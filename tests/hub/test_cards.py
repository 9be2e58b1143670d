"""Model cards: their metadata read back by huggingface_hub, and what they say. Licences are read from folders."""

import re
import warnings
from pathlib import Path

import pytest
from hub_examples import (
    image_anchors,
    image_stitches,
    page,
    rows_of,
    some_scores,
    stitched_lm,
    text_anchors,
)  # fmt: skip
from huggingface_hub import ModelCard
from tiny_models import tiny_model, token_ids
from tiny_supernets import tiny_supernet
from transformers import AutoModelForImageClassification, AutoTokenizer

from klas_hf import (
    ProbeNet,
    ResultRow,
    StitchedBackbone,
    StitchedModel,
    StitchedSupernet,
    TrainingConfig,
    measure_costs,
    train_probes,
    train_stitches,
)
from klas_hf.hub import model_card
from klas_hf.hub.licences import Licence, carried_licence, check_name, is_legal_file
from klas_hf.hub.results import own_rows

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
BASES = ["org/Small", "org/Large"]


def reread(card: ModelCard, tmp_path: Path) -> ModelCard:
    card.save(tmp_path / "card" / "README.md")
    return ModelCard.load(tmp_path / "card" / "README.md")


def test_metadata_of_a_language_model(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    model.add_model_tags(["sft"])
    made = model_card(
        model, "me/between", rows=rows_of(), dataset="org/corpus", split="test", base_model=BASES, tags=["mine"]
    )
    data = reread(made, tmp_path).data
    assert data.base_model == BASES and data.base_model_relation == "merge"
    assert (data.license, data.license_name, data.license_link) == ("mit", None, None)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["stitched", "klas", "mine", "sft"]
    assert data.datasets == ["org/corpus"] and data.model_name == "between"
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("loss", "loss", 3.0),
        ("extra", "extra", 1.5),
    ]
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type, result.dataset_name) == (
            "text-generation", "org/corpus", "org/corpus",
        )  # fmt: skip
        assert result.dataset_split == "test"


def test_text_says_where_it_comes_from_what_it_costs_and_how_good_it_is(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    training = TrainingConfig(learning_rate=0.125, trainable="stitch")
    rows = rows_of()
    card = model_card(
        model, "me/between", rows=rows, dataset="my text", base_model=BASES, training=training, picture="curve.png"
    )
    cost = measure_costs(model)
    text = card.text
    for part in (
        "# between",
        "[org/Small](https://huggingface.co/org/Small)",
        "| path",
        "`0[:2] 1[3:]`",
        f"{cost.parameters / 1e6:,.2f} million",
        f"{cost.macs / 1e6:,.1f} million",
        f"{cost.kv_bytes_per_token:,}",
        f"R² = {model.config.joint_fits[0]['r2']:.3f}",
        f"{model.config.joint_fits[0]['rows']:,} positions",
        "Measured on my text:",
        "| klas   | 0[:2] 1[3:] | 0.00         | 2.0    | 50%       | 3.0000 ± 0.5000 |",
        "![picture of the results](curve.png)",
        "`0.125`",
        "`stitch`",
        "`mit`, as its anchors",
        "2605.29259",
        'AutoTokenizer.from_pretrained("me/between")',
    ):
        assert part in text, part
    assert card.data.datasets is None  # "my text" is nothing on the Hub
    assert "curve.png" not in model_card(model, "me/between").text
    assert str(tmp_path) not in card.content


def test_a_text_says_how_it_was_trained_and_silence_is_named(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    assert "By candlelight." in model_card(model, "me/x", training="By candlelight.").text
    assert "was not given" in model_card(model, "me/x").text
    with pytest.raises(TypeError, match="got training of int"):
        model_card(model, "me/x", training=3)


def test_the_trainings_that_the_model_keeps_are_shown(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    examples = [{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}]
    settings = {"trainable": "full", "gradient_accumulation_steps": 1, "save_steps": 7}
    train_stitches(model, examples, TrainingConfig(**settings, max_steps=3))
    result = train_stitches(model, examples, TrainingConfig(max_steps=1, augmentation=None))
    text = model_card(model, "me/x").text
    assert text.count("Then fine-tuned with:") == 2 and text.count("1 examples of text") == 2
    assert text.index("`full`") < text.index("`lora`") and "3 on 1 process" in text
    assert f"{result.losses[0]:.4f}, {result.losses[0]:.4f} nats per label" in text and "was not given" not in text
    assert "By candlelight." in model_card(model, "me/x", training="By candlelight.").text


def test_anchors_without_hub_ids_are_not_base_models_and_their_folders_stay_private(tmp_path: Path) -> None:
    card = model_card(stitched_lm(text_anchors(tmp_path)), "me/x")
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert "small-lm" in card.text and "large-lm" in card.text and str(tmp_path) not in card.content
    in_memory = stitched_lm((tiny_model(seed=1), tiny_model(large=True, seed=2)), calibration=None)
    with pytest.warns(UserWarning, match="states a licence"):
        card = model_card(in_memory, "me/x")
    assert card.data.license is None and "## Licence" not in card.text
    assert "a model in memory" in card.text and "random weights" in card.text


def test_as_many_base_models_as_anchors(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    for wrong in (["org/Small"], "org/Small"):
        with pytest.raises(ValueError, match="expected a list of 2 Hub ids"):
            model_card(model, "me/x", base_model=wrong)


@pytest.mark.parametrize("second", ["mit", None])
def test_different_licences_need_a_word(second: str | None, tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path, ("apache-2.0", second)))
    with pytest.raises(ValueError, match=r"small-lm \(apache-2.0\), large-lm \((mit|no licence stated)\)"):
        model_card(model, "me/x")
    card = model_card(model, "me/x", licence="apache-2.0")
    assert card.data.license == "apache-2.0" and "`apache-2.0`.\n" in card.text


def test_another_licence_is_carried_with_name_and_link(tmp_path: Path) -> None:
    other = "other\nlicense_name: own-1\nlicense_link: https://example.org/own"
    model = stitched_lm(text_anchors(tmp_path, (other, other)))
    card = reread(model_card(model, "me/x"), tmp_path)
    link = "https://example.org/own"
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own-1", link)
    assert "[own-1](https://example.org/own)" in card.text
    page(tmp_path / "small-lm", other.replace("own-1", "own-2"))
    with pytest.raises(ValueError, match="own-2.*own-1"):
        model_card(model, "me/x")
    assert model_card(model, "me/x", licence="own-2").data.license_name == "own-2"


def test_llamas_name_begins_with_llama(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path, ("llama3.2", "llama3.2")))
    for name in ("me/between", "Llama/between", "me/My-Llama"):
        with pytest.raises(ValueError, match="llama3.2, which asks that the name .* begins with 'Llama'"):
            model_card(model, name)
    text = model_card(model, "me/Llama-between").text
    assert "\n\nBuilt with Llama\n\n" in text
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta" in text
    with pytest.raises(ValueError, match="licence='mit'.*expected llama3.2"):
        model_card(model, "me/Llama-between", licence="mit")


def test_one_llama_binds_the_whole(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path, ("mit", "llama3.1")))
    assert model_card(model, "me/Llama-x", licence="llama3.1").data.license == "llama3.1"
    with pytest.raises(ValueError, match="begins with 'Llama'"):
        model_card(model, "me/x", licence="llama3.1")


@pytest.mark.parametrize(
    ("label", "good", "bad"),
    [
        ("llama2", ["me/x", "me/Llama-x"], []),
        ("llama3", ["me/Llama-3-x", "Llama3x"], ["me/Llama-x", "me/x"]),
        ("llama3.3", ["Llama-x", "me/Llama"], ["me/llama-x", "me/x"]),
        ("llama4", ["Llama-x"], ["me/x"]),
        ("llama-3.1-community", ["Llama-x"], ["me/x"]),
        ("mit", ["me/x"], []),
    ],
)
def test_name_rules(label: str, good: list[str], bad: list[str]) -> None:
    licences = [None, Licence("other", label) if "community" in label else Licence(label)]
    for name in good:
        check_name(licences, name)
    for name in bad:
        with pytest.raises(ValueError, match="begins with"):
            check_name(licences, name)


def test_licences_that_agree_need_no_word() -> None:
    assert carried_licence({"a": Licence("mit"), "b": Licence("mit")}) == Licence("mit")
    assert carried_licence({"a": None, "b": None}) is None
    assert carried_licence({"a": None, "b": None}, "mit") == Licence("mit")
    assert carried_licence({"a": Licence("llama3.1"), "b": Licence("llama3.2")}, "llama3.2") == Licence("llama3.2")


def test_which_files_are_legal_ones() -> None:
    legal = ["LICENSE", "LICENSE.txt", "licence.md", "NOTICE", "USE_POLICY.md", "LICENSE-MIT"]
    assert all(map(is_legal_file, legal))
    assert not any(map(is_legal_file, ["README.md", "config.json", "noticeable.json", "model.safetensors"]))


def test_rows_need_a_dataset_and_must_be_the_models_own(tmp_path: Path) -> None:
    model = stitched_lm(text_anchors(tmp_path))
    with pytest.raises(ValueError, match="expected dataset="):
        model_card(model, "me/x", rows=rows_of())
    with pytest.raises(ValueError, match=r"got rows of the paths 0\[:1\] 1\[1:\]; expected some .* 0\[:2\] 1\[3:\]"):
        model_card(model, "me/x", rows=[rows_of()[4]], dataset="x")
    with pytest.raises(ValueError, match="expected none"):
        model_card(some_scores(tmp_path), "me/x", rows=rows_of(), dataset="x")


@pytest.mark.parametrize("trained", [True, False])
def test_figures_of_a_healed_anchor_are_not_those_of_the_anchor_as_it_was(trained: bool, tmp_path: Path) -> None:
    model = StitchedModel.from_path(text_anchors(tmp_path), "0[:]")
    if trained:
        ids = token_ids(4, 8).tolist()
        settings = TrainingConfig(trainable="full", max_steps=1, per_device_batch_size=4)
        train_stitches(model, [{"input_ids": row, "labels": row} for row in ids], settings)
    rows = [
        ResultRow("source", "0[:]", 0, 10, 10, {"loss": 4.0}),
        ResultRow("made", "0[:]", 0, 10, 10, {"loss": 3.0}, training={"max_steps": 1}),
        ResultRow("target", "1[:]", 0, 20, 20, {"loss": 1.0}),
    ]
    assert own_rows(rows, ["0[:]"], trained) == {"0[:]": [rows[trained]]}
    (result,) = reread(model_card(model, "me/x", rows=rows, dataset="org/corpus"), tmp_path).data.eval_results
    assert result.metric_value == (3.0 if trained else 4.0)


def test_metadata_of_image_models(tmp_path: Path) -> None:
    anchors = image_anchors(tmp_path)
    model = StitchedModel.from_anchors(*anchors, (1, 2))
    card = model_card(model, "me/x", rows=rows_of((1, 2), "accuracy"), dataset="org/pictures")
    assert (card.data.pipeline_tag, card.data.license) == ("image-classification", "apache-2.0")
    assert [r.metric_type for r in card.data.eval_results] == ["accuracy", "extra"]
    assert card.data.eval_results[0].task_type == "image-classification"
    assert f"{measure_costs(model).macs / 1e6:,.1f} million" in card.text and "image of 32×32 pixels" in card.text
    backbone = model_card(StitchedBackbone(model.config), "me/x")
    assert backbone.data.pipeline_tag == "image-feature-extraction" and "Stitched backbone" in backbone.text
    decoder = stitched_lm(text_anchors(tmp_path)).model
    assert model_card(decoder, "me/x").data.pipeline_tag == "feature-extraction"


def test_metadata_of_a_supernet(tmp_path: Path) -> None:
    anchors = image_anchors(tmp_path)
    models = tuple(AutoModelForImageClassification.from_pretrained(folder) for folder in anchors)
    supernet = tiny_supernet(models, image_stitches(models))
    first, last = rows_of((1, 1), "accuracy"), rows_of((2, 2), "accuracy")
    card = model_card(supernet, "me/x", rows=first[:3] + last[1:2], dataset="org/p", base_model=["a/b", "c/d"])
    assert card.data.base_model == ["a/b", "c/d"] and card.data.base_model_relation == "merge"
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results["accuracy, path 0[:1] 1[1:]"] == 3.0 and results["accuracy, path 0[:2] 1[2:]"] == 2.5
    assert (
        f"{max(cost.macs for cost in supernet.path_costs) / 1e6:,.1f} million" in card.text
        and str(len(supernet.paths)) in card.text
    )
    assert "0. [a/b](https://huggingface.co/a/b)" in card.text


def test_a_supernet_of_language_models(tmp_path: Path) -> None:
    supernet = StitchedSupernet.from_anchors([str(folder) for folder in text_anchors(tmp_path)], [(1, 1), (2, 3)])
    card = model_card(supernet, "me/x", rows=rows_of(), dataset="x")
    assert {r.task_type for r in card.data.eval_results} == {"text-generation"}
    assert [r.metric_name for r in card.data.eval_results][:2] == ["loss, path 0[:1] 1[1:]", "extra, path 0[:1] 1[1:]"]
    assert "random weights" in card.text and "small-lm" in card.text and card.data.license == "mit"


def test_metadata_of_probes_and_scores(tmp_path: Path) -> None:
    small, _ = text_anchors(tmp_path)
    probes = train_probes(str(small), [{"input_ids": token_ids(8, 16)}])
    assert isinstance(probes, ProbeNet)
    card = model_card(probes, "me/x", base_model=["org/Small"])
    assert (card.data.base_model, card.data.base_model_relation) == (["org/Small"], "adapter")
    assert card.data.license == "mit" and card.data.tags == ["probes", "klas"]
    assert f"{min(probes.config.r2):.3f} to {max(probes.config.r2):.3f}" in card.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scores hold nothing of the anchors, whose licence does not matter
        card = model_card(some_scores(tmp_path), "me/x", picture="heatmap.png")
    assert card.data.base_model is None and card.data.license is None and card.data.library_name is None
    assert "[big/model](https://huggingface.co/big/model)" in card.text and "345 tokens of 12 sequences" in card.text
    card = model_card(some_scores(tmp_path), "me/x", licence="cc0-1.0")
    assert card.data.license == "cc0-1.0" and "`cc0-1.0`.\n" in card.text


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="got LlamaForCausalLM; expected StitchScores or one of StitchedForCausalLM"):
        model_card(tiny_model(), "me/x")


def test_tokenizers_of_the_examples_know_the_words_of_the_cards_code(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_anchors(tmp_path)[1])
    code = re.search(r"```python\n(.*?)```", model_card(stitched_lm(text_anchors(tmp_path)), "me/x").text, re.DOTALL)
    assert code and "Once upon a time" in code[1]
    assert tokenizer("Once upon a time")["input_ids"] == [3, 4, 5, 6]
