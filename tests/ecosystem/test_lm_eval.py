"""lm-evaluation-harness runs stitched checkpoints, and our ROUGE equals the harness's own functions."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from saved_models import TEXT, SavedModel, save_stitched

from klas_hf.evaluation.truthfulqa_rouge import KINDS, TruthfulQARouge, rouge_readings

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks.truthfulqa.utils import preprocess_function, process_results_gen  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

TOKENS = 8
QUESTIONS = [
    {"question": "the quick brown fox jumps", "choices": ["over the dog", "house", "a lazy cat"], "answer": 0},
    {"question": "a cat ran to", "choices": ["its house", "sing", "one; big; bird"], "answer": 1},
    {"question": "one big bird", "choices": ["sat down", "sang.", "jumps"], "answer": 2},
]
TASKS = {
    "tiny_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} " + TEXT,
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    return save_stitched(tmp_path_factory.mktemp("saved"), "qwen2", "llama")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks over local data. JSON is YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = {"dataset_path": "json", "dataset_kwargs": local_data(folder, "data.jsonl"), "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return folder


def local_data(folder: Path, name: str) -> dict[str, Any]:
    return {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}


@torch.no_grad()
def log_likelihood(saved: SavedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """In nats, and whether every token is the likeliest; one forward for each token, without a cache."""
    total, likeliest = 0.0, True
    for place, token in enumerate(continuation):
        ids = torch.tensor([context + continuation[:place]])
        log_p = saved.logits(ids)[0, -1].double().log_softmax(-1)
        total += float(log_p[token])
        likeliest &= int(log_p.argmax()) == token
    return total, likeliest


def choice_likelihoods(saved: SavedModel, question: dict[str, Any]) -> list[tuple[float, bool]]:
    context = saved.tokenizer(question["question"])["input_ids"]
    whole = [saved.tokenizer(f"{question['question']} {choice}")["input_ids"] for choice in question["choices"]]
    return [log_likelihood(saved, context, ids[len(context) :]) for ids in whole]


def rolling_likelihood(saved: SavedModel, question: dict[str, Any]) -> tuple[float, int]:
    """Nats of the whole text after BOS, and its bytes."""
    text = f"{question['question']} {TEXT}"
    ids = saved.tokenizer(text)["input_ids"]
    assert len(ids) < 128  # the model's length, so that the harness reads it in one window
    return log_likelihood(saved, [saved.tokenizer.bos_token_id], ids)[0], len(text.encode())


def check_samples(saved: SavedModel, samples: dict[str, list[dict[str, Any]]]) -> None:
    """What the harness logged for each question is what the model gives."""
    for sample in samples["tiny_choices"]:
        got = [(float(value), str(likeliest) == "True") for ((value, likeliest),) in sample["resps"]]
        expected = choice_likelihoods(saved, sample["doc"])
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-3)
        assert [likeliest for _, likeliest in got] == [likeliest for _, likeliest in expected]
    for sample in samples["tiny_answers"]:
        text = saved.continuation(saved.encode(sample["doc"]["question"]), TOKENS)
        assert sample["resps"] == [[text.split("\n")[0]]]


def check_results(saved: SavedModel, results: dict[str, dict[str, Any]]) -> None:
    chosen = [[value for value, _ in choice_likelihoods(saved, question)] for question in QUESTIONS]
    right = [
        values.index(max(values)) == question["answer"] for values, question in zip(chosen, QUESTIONS, strict=True)
    ]
    assert results["tiny_choices"]["acc,none"] == pytest.approx(sum(right) / len(right))
    nats, sizes = zip(*(rolling_likelihood(saved, question) for question in QUESTIONS), strict=True)
    expected = math.exp(-sum(nats) / sum(sizes))
    assert results["tiny_text"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_command_runs_a_folder_with_the_code_it_carries(saved: SavedModel, tasks: Path, tmp_path: Path) -> None:
    arguments = f"--model hf --model_args pretrained={saved.folder} --trust_remote_code --device cpu --batch_size 2"
    output = f"--include_path {tasks} --tasks {','.join(TASKS)} --output_path {tmp_path / 'out'} --log_samples"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split(), *output.split()],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    check_results(saved, json.loads(results.read_text())["results"])
    samples = {}
    for name in TASKS:
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(samples[name]) == len(QUESTIONS)
    check_samples(saved, samples)


def evaluate(
    saved: SavedModel, tasks: Path, names: list[str], batch_size: int = 1, **model_args: Any
) -> dict[str, Any]:
    """The harness's own function; it seeds everything, so torch's state is put back."""
    state = torch.get_rng_state()
    try:
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(saved.folder), **model_args},
            tasks=names,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            batch_size=batch_size,
            bootstrap_iters=0,
        )
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_function_runs_a_folder_where_klas_hf_is_imported(saved: SavedModel, tasks: Path, batch_size: int) -> None:
    output = evaluate(saved, tasks, list(TASKS), batch_size)
    check_results(saved, output["results"])
    check_samples(saved, output["samples"])


WORDS = ["cats", "cat", "see", "the", "No", "comment", "I", "have", ".", " . ", "\n", "1952", "don't", "ß"]
answers = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
references = st.lists(answers.filter(lambda text: text.strip()), min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(answers, references, references), min_size=1, max_size=2))
@settings(  # the harness draws 1000 bootstrap samples for each pair of texts, so that shrinking would take minutes
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate]
)
@pytest.mark.slow
def test_rouge_equals_the_harness(rows: list[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> None:
    asked = [
        {"question": "Why?", "best_answer": "", "correct_answers": list(correct), "incorrect_answers": list(incorrect)}
        for _, correct, incorrect in rows
    ]
    ours = rouge_readings([answer for answer, *_ in rows], asked)
    for place, ((answer, *_), raw) in enumerate(zip(rows, asked, strict=True)):
        theirs = process_results_gen(preprocess_function(raw), [answer])
        for name in (f"{kind}_{what}" for kind in KINDS for what in ("max", "diff", "acc")):
            assert ours[f"lm_eval_{name}"][place] == theirs[name]


def test_rouge_of_a_stitched_model_equals_the_harness_task(saved: SavedModel, tmp_path: Path) -> None:
    """The harness's `truthfulqa_gen`, prompt and all, over local questions; and our scores of the answers it got."""
    questions = {"why?": [["the fox sat", "a dog and"], ["one bird", "over the"]]}
    questions |= {"who sang?": [["one bird"], ["the cat jumps", "lazy dog ran"]]}

    def ask(questions: dict[str, list[list[str]]]) -> list[dict[str, Any]]:
        asked = [
            {"best_answer": correct[0], "correct_answers": correct, "incorrect_answers": incorrect}
            for correct, incorrect in questions.values()
        ]
        with (tmp_path / "questions.jsonl").open("w") as file:
            for question, references in zip(questions, asked, strict=True):
                file.write(json.dumps({"question": question, **references}) + "\n")
        return asked

    ask(questions)
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_gen.yaml"),
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": local_data(tmp_path, "questions.jsonl"),
        "validation_split": "test",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False},
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    output = evaluate(saved, tmp_path, ["local_questions"], max_length=1024)
    said = {sample["doc"]["question"]: sample["filtered_resps"][0] for sample in output["samples"]["local_questions"]}
    asked = ask({one: [[*correct, said[one]], wrong] for one, (correct, wrong) in questions.items()})
    output = evaluate(saved, tmp_path, ["local_questions"], max_length=1024)
    samples = sorted(output["samples"]["local_questions"], key=lambda sample: sample["doc_id"])
    prompt = samples[0]["arguments"][0][0]
    assert prompt.startswith("Q: What is human life expectancy")
    assert prompt.endswith("Q: why?")
    answered = [sample["filtered_resps"][0] for sample in samples]
    ours = TruthfulQARouge(keep_in_memory=True).compute(predictions=answered, references=asked)
    assert ours["lm_eval_rouge1_max"] > 0
    for name in (f"{kind}_{what}" for kind in KINDS for what in ("max", "diff", "acc")):
        got = output["results"]["local_questions"][f"{name},none"]
        assert got == pytest.approx(ours[f"lm_eval_{name}"], abs=1e-12)
