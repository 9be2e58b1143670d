"""Models on the field's tasks: the recipe as launched on tiny Llamas, interrupted and gone on with, and its figures.

Figures are compared with lm_eval run on an anchor's folder alone, and with a sliding window written out here.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from math import exp
from pathlib import Path as Folder
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import binomtest
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: klas_hf[evaluation]")

RECIPES = Folder(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import benchmark_language as recipe  # noqa: E402
from experiments import field_report, field_tasks, harness, offline_tasks  # noqa: E402
from experiments.field_tasks import perplexity_tasks  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from klas_hf.data.text import held_out, text_windows, train_tokenizer  # noqa: E402
from klas_hf.hub.results import own_rows  # noqa: E402
from klas_hf.rows import read_rows  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per", "ignore:.*states a licence"),
]
TASKS = ["perplexity_documentation", "documentation", "documentation_next_word"]
LIMIT, WINDOW = 6, 40
HARNESS = Folder(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Python's topics without its docstrings, and the harness without its list of installed packages at each call."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for module in (offline_tasks, field_tasks):
            patch.setattr(module, "python_documentation", lambda: [topics[name] for name in sorted(topics)])
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Two random Llamas with one tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("anchors")
    texts = held_out([topics[name] for name in sorted(topics)])[0]
    tokenizer = train_tokenizer(texts, 400)
    (folder / "text.txt").write_text("\n\n".join(texts)[:12_000])
    for name, width, depth in (("small", 16, 3), ("large", 32, 4)):
        torch.manual_seed(depth)
        config = LlamaConfig(
            vocab_size=400, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def words(anchors: Folder, output: Folder, **changes: object) -> list[str]:
    given = {
        "anchors": [anchors / "small", anchors / "large"], "text": anchors / "text.txt", "tasks": TASKS,
        "budgets": ["70%"], "rivals": ["shortgpt"], "contenders": 1, "steps": 1,
        "seeds": [0], "length": 24, "prompt": 8, "window": WINDOW, "limit": LIMIT, "output_dir": output,
    } | changes  # fmt: skip
    found = []
    for name, value in given.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def launch(argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark_language.py", *argv])
        recipe.main()


@pytest.fixture(scope="module")
def done(anchors: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The output of a run that was interrupted in the middle of a model's tasks, and went on."""
    output = tmp_path_factory.mktemp("benchmark")
    measured: list[str] = []
    measure = harness._Loaded.measure

    def interrupted(self, model):
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(self.name)
        return measure(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness._Loaded, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(words(anchors, output))
    before = (output / "rows.jsonl").read_text()
    assert before.count('"task": "documentation') == 9
    launch(words(anchors, output))
    assert (output / "rows.jsonl").read_text().startswith(before)
    return output


def test_every_model_has_a_row_of_every_task(anchors: Folder, done: Folder) -> None:
    rows = read_rows(done / "rows.jsonl")
    by_task = {task: [row for row in rows if row.setting["task"] == task] for task in ["speed", *TASKS]}
    assert len({len(one) for one in by_task.values()}) == 1
    models = {(row.rule, row.path, row.seed, row.setting["weights"], row.training is not None) for row in rows}
    assert len(models) == len(by_task["speed"])
    assert ("anchors", "1[:]", 0, "as it is", True) in models
    assert {rule for rule, *_ in models} >= {"anchors", "search", "shortgpt", "large in int8", "large in int4"}
    assert all(row.setting["lm_eval"] == lm_eval.__version__ for row in by_task["documentation"])
    speed = {row.setting["weights"]: row.metrics for row in by_task["speed"] if row.path == "1[:]" and not row.training}
    whole = AutoModelForCausalLM.from_pretrained(anchors / "large")
    assert speed["as it is"]["bytes"] == 4 * whole.num_parameters()
    assert speed["int4"]["bytes"] < speed["int8"]["bytes"] < speed["as it is"]["bytes"]
    assert all(one["first_token"] > 0 and one["per_token"] > 0 for one in speed.values())


def test_an_anchors_figures_are_those_of_the_harness_alone(anchors: Folder, done: Folder) -> None:
    alone = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(anchors / "large")}, tasks=TASKS[1:],
        task_manager=TaskManager(include_path=str(done / "tasks"), include_defaults=False), device="cpu", batch_size=8,
        limit=LIMIT, bootstrap_iters=0,
    )  # fmt: skip
    rows = [row for row in read_rows(done / "rows.jsonl") if row.path == "1[:]" and row.training is None]
    ours = {row.setting["task"]: row.metrics for row in rows if row.setting["weights"] == "as it is"}
    for name in ("acc", "acc_norm"):
        assert ours["documentation"][name] == alone["groups"]["documentation"][f"{name},none"]
    written = alone["results"]["documentation_next_word"]["exact_match,stripped"]
    assert ours["documentation_next_word"]["exact_match (stripped)"] == written
    chosen = alone["samples"]["documentation_cloze"] + alone["samples"]["documentation_endings"]
    items = next(row for row in rows if row.setting["task"] == "documentation").details["items"]["values"]["acc"]
    assert items == [sample["acc"] for sample in chosen]


@pytest.fixture(scope="module")
def with_bos(anchors: Folder) -> PreTrainedTokenizerFast:
    """A tokenizer that begins a text with BOS, as Llama's does."""
    tokenizer = AutoTokenizer.from_pretrained(anchors / "large")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_perplexity_equals_windows_by_hand(anchors: Folder, with_bos: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(anchors / "large").eval()
    (task,), missing = perplexity_tasks(
        ["perplexity_documentation"], with_bos, window=WINDOW, batch_size=3, copies={}, limit=7
    )
    ids = with_bos("\n\n".join(held_out([topics[name] for name in sorted(topics)])[1]))["input_ids"]
    assert ids[0] == 1 and 1 not in ids[1:]
    total = 0.0
    for start in range(0, 7 * WINDOW, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        with torch.no_grad():
            log_p = model(window).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[place - 1, window[0, place]]) for place in range(1, WINDOW))
    measured = task.measure(model)
    assert missing == {}
    assert measured.metrics["perplexity"] == pytest.approx(exp(total / (7 * (WINDOW - 1))), rel=1e-5)
    assert np.mean(measured.details["items"]["values"]["perplexity"]) == pytest.approx(measured.metrics["loss"])


def test_perplexity_equals_the_harness_wikitext_task(
    anchors: Folder, with_bos: PreTrainedTokenizerFast, tmp_path: Folder
) -> None:
    """The harness's own `wikitext`, from a local copy in the Hub's layout, of one text that is one window.

    The harness puts BOS before a text by itself; its tokenizer must not do so too.
    """
    text = "The loop runs until the test fails. " * 5
    copy = tmp_path / "wikitext_document_level"
    copy.mkdir()
    splits = [{"split": name, "path": "pages.jsonl"} for name in ("train", "validation", "test")]
    configs = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": splits}]}
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n")
    (copy / "pages.jsonl").write_text(json.dumps({"page": text}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(anchors / "large")
    (task,), missing = harness.harness_tasks(
        ["wikitext"], tokenizer, include=[HARNESS / "wikitext"], scratch=tmp_path,
        copies={"EleutherAI/wikitext_document_level": str(copy)},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(anchors / "large").eval()
    found = task.measure(model)
    (window,) = text_windows(text, with_bos, len(with_bos(text)["input_ids"]))
    loss = float(model(input_ids=torch.tensor([window]), labels=torch.tensor([window])).loss.detach())
    nats = loss * (len(window) - 1)
    assert missing == {} and task.about["version"] == 2.0
    assert task.source["dataset"] == "EleutherAI/wikitext_document_level"  # not where the copy lies
    moved = shutil.copytree(HARNESS / "wikitext", tmp_path / "moved")
    there, elsewhere = (
        TaskManager(include_path=str(one), include_defaults=False) for one in (HARNESS / "wikitext", moved)
    )
    digests = {harness._configuration(one, "wikitext") for one in (there, elsewhere)}
    assert digests == {task.about["configuration"]}
    (moved / "wikitext.yaml").write_text((moved / "wikitext.yaml").read_text().replace("version: 2.0", "version: 2.1"))
    changed = TaskManager(include_path=str(moved), include_defaults=False)
    assert harness._configuration(changed, "wikitext") not in digests
    assert found.metrics["byte_perplexity"] == pytest.approx(exp(nats / len(text.encode())), rel=1e-5)
    assert found.details["higher_is_better"]["word_perplexity"] is False


def test_report_compares_items_and_cards_carry_figures(done: Folder) -> None:
    text = (done / "report.md").read_text()
    rows = read_rows(done / "rows.jsonl")
    healed = {
        (row.rule, row.seed): row for row in rows
        if row.setting["task"] == "documentation" and (row.training or row.rule == "large in int8")
    }  # fmt: skip
    differences = [
        np.subtract(*(healed[rule, seed].details["items"]["values"]["acc_norm"] for rule in ("search", "shortgpt")))
        for seed in (0,)
    ]
    (line,) = (line for line in text.split("## Ours less")[1].splitlines() if line.startswith("| 70%    | shortgpt"))
    told = line.split("|")[4].strip()
    assert told == "the same" if not np.any(differences) else told.startswith(f"{np.mean(differences):+.4f} (")
    assert "Only the first 6 documents" in text and "Published" not in text
    for name in (*TASKS, "documentation"):
        assert (done / f"curve-{name}.png").stat().st_size > 2000
    models = read_rows(done / "models.jsonl")
    assert len(models) == len(rows) // 4
    ours = next(row for row in models if row.rule == "search" and row.seed == 0)
    assert ours.metrics["documentation: acc_norm"] == healed["search", 0].metrics["acc_norm"]
    folders = [one for one in (done / "models").iterdir() if "seed-0" in one.name]
    card = ModelCard.load(folders[0] / "README.md")
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results["documentation", "acc_norm"] == ours.metrics["documentation: acc_norm"]
    assert results["perplexity_documentation", "perplexity"] == ours.metrics["perplexity_documentation: perplexity"]
    assert not any(metric == "bytes" for _, metric in results)
    kept = AutoModelForCausalLM.from_pretrained(folders[0])
    assert list(own_rows([ours], [kept.config.path])) == [ours.path]


def test_seeds_of_one_document_are_drawn_together() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 40))
    once, twice = (field_report.difference([(a, b)] * count, better=True) for count in (1, 2))
    assert once == twice  # a second seed that says the same adds nothing
    apart = field_report.difference([(a, b), (a + 1, b)], better=True)
    assert apart.startswith(f"{np.mean(a - b) + 0.5:+.4f} (")


def test_one_seed_adds_mcnemars_p(done: Folder) -> None:
    rows = [
        row for row in read_rows(done / "rows.jsonl") if row.setting["task"] == "documentation" and not row.training
    ]
    a, b = (row.details["items"]["values"]["acc"] for row in rows[:2])
    told = field_report.difference([(a, b)], better=True)
    only_a, only_b = (sum(x > y for x, y in zip(one, other, strict=True)) for one, other in ((a, b), (b, a)))
    if only_a + only_b:
        assert told.endswith(f"p = {binomtest(only_a, only_a + only_b).pvalue:.3f}")
    assert field_report.difference([(a, a)], better=True) == "the same"
    assert "p =" not in field_report.difference([([0.5, 1.0, 3.0], [1.0, 2.0, 2.5])], better=False)
    assert field_report.difference([([1.0, 2.0], [2.0, 4.0])], better=False).startswith(
        "+1.5000"
    )  # a loss that is lower


def test_data_that_cannot_be_had_is_told_and_the_others_go_on(
    anchors: Folder, tmp_path: Folder, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    task = {"include": str(HARNESS / "piqa" / "piqa.yaml"), "task": "piqa"}
    (tmp_path / "mine" / "piqa.yaml").write_text(json.dumps(task))
    tokenizer = AutoTokenizer.from_pretrained(anchors / "large")
    args = recipe.BenchmarkArguments(
        tasks=["piqa", "documentation_next_word:2"], include_path=[str(tmp_path / "mine")], limit=2
    )
    tasks, missing = recipe.tasks_of(args, tokenizer, tmp_path / "out")
    assert [task.name for task in tasks] == ["speed", "documentation_next_word"]
    assert tasks[1].about["shots"] == 2
    assert "baber/piqa" in missing["piqa"] and "--copies baber/piqa=FOLDER" in missing["piqa"]


def test_unknown_tasks_are_refused_with_the_nearest_names(
    anchors: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(_without_defaults, TaskManager))
    with pytest.raises(SystemExit) as end:
        launch(words(anchors, tmp_path / "out", tasks=["documentation", "documentation_clozed"]))
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "does not know (documentation_clozed: nearest are documentation_cloze" in told
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def _without_defaults(manager: type, include_path: list[str], include_defaults: bool = False) -> TaskManager:
    """The harness's own tasks, whose reading takes ten seconds, left out."""
    return manager(include_path=include_path, include_defaults=False)


def test_rows_of_another_harness_are_refused_by_name(
    anchors: Folder, done: Folder, tmp_path: Folder, capsys: pytest.CaptureFixture
) -> None:
    text = (done / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace(f'"lm_eval": "{lm_eval.__version__}"', '"lm_eval": "0.4.9"'))
    with pytest.raises(SystemExit) as end:
        launch(words(anchors, tmp_path))
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "another run, which differs in lm_eval" in told and "0.4.9" in told and lm_eval.__version__ in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"anchors": ["a", "b"]}, "a text to heal and choose on"),
        ({"budgets": ["80%", "60%"]}, "expected ascending"),
        ({"budgets": ["4 GB"]}, "expected shares"),
        ({"copies": ["allenai/c4"]}, "HUB_ID=FOLDER"),
        ({"cost": "watts"}, "expected one of macs, parameters"),
    ],
)
def test_bad_options(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.BenchmarkArguments(**given)


def test_published_figures_stand_apart_and_have_sources(tmp_path: Folder) -> None:
    table = field_report.published_table(RECIPES / "published_language.yaml")
    assert "method (published)" in table and table.count("huggingface.co") >= 3
    (tmp_path / "bad.yaml").write_text("- {model: x, method: y, kept: 1, figures: {}}")
    with pytest.raises(ValueError, match=r"without \['source'\]"):
        field_report.published_table(tmp_path / "bad.yaml")


def test_the_settings_of_llama_are_read() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--config", str(RECIPES / "benchmark_llama3.yaml")])
        (args,) = recipe.parse_options(recipe.BenchmarkArguments)
    assert args.window == 2048 and "mmlu:5" in args.tasks and args.anchors[1].endswith("3B")


CSV = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
A,B,Why?,Because,Because; It is so,Never; No,
A,B,Who?,Nobody,Nobody,Everybody; You; Me,
"""


def test_truthfulqa_is_the_harness_task_on_the_file(anchors: Folder, tmp_path: Folder) -> None:
    (tmp_path / "questions.csv").write_text(CSV)
    offline_tasks.write_offline_tasks(tmp_path / "tasks", truthfulqa=str(tmp_path / "questions.csv"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    tasks = manager.load(list(offline_tasks.TRUTHFULQA))["tasks"]
    mc1, mc2, written = (tasks[name] for name in offline_tasks.TRUTHFULQA)
    first, second = mc1.test_docs()
    assert mc1.doc_to_text(first).startswith("Q: What is human life expectancy in the United States?")
    assert mc1.doc_to_text(first).endswith("Q: Why?\nA:")
    assert mc1.doc_to_choice(first) == ["Because", "Never", "No"] and mc1.doc_to_target(first) == 0
    assert mc2.doc_to_choice(first) == ["Because", "It is so", "Never", "No"]
    assert second["mc2_targets"]["labels"] == [1, 0, 0, 0]
    (answers, _) = written.test_docs()
    assert answers["correct_answers"] == ["Because.", "It is so.", "I have no comment."]


def test_copies_must_lie_where_they_are_said_to(anchors: Folder, tmp_path: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(anchors / "large")
    include = [HARNESS / "wikitext"]
    with pytest.raises(ValueError, match="copies=a/b=nowhere, where nothing lies"):
        harness.harness_tasks(["wikitext"], tokenizer, include=include, scratch=tmp_path, copies={"a/b": "nowhere"})
    with pytest.raises(ValueError, match="NAME:SHOTS with a whole number"):
        harness.harness_tasks(["mmlu:five"], tokenizer, scratch=tmp_path)


@pytest.mark.slow
def test_offline_as_launched(tmp_path: Folder) -> None:
    """The quickstart's anchors, barely trained, on all that needs no network."""
    (tmp_path / "questions.csv").write_text(CSV)
    words = ["--smoke", "--data", "questions.csv", "--cost", "bytes", "--cache_dir", "cache", "--window", "64"]
    words += ["--rivals", "klas"]  # each more takes half a minute
    published = ["--published", str(RECIPES / "published_language.yaml"), "--output_dir", "out"]
    done = subprocess.run(
        [sys.executable, str(RECIPES / "benchmark_language.py"), *words, *published],
        capture_output=True, text=True, cwd=tmp_path, timeout=1500,
        env=os.environ | {"PYTHONPATH": str(RECIPES.parent), "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "truthfulqa_mc2_local, acc" in text and "## Published, not measured here" in text
    assert "benchmark_language.py --smoke" in (tmp_path / "out" / "command.txt").read_text()
