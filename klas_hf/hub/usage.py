"""The lines on a model card that use what the repo holds; they run as they stand."""

from collections.abc import Callable

Code = Callable[[str, bool], str]


def language(repo_id: str, processor: bool) -> str:
    """Writing with a language model."""
    if not processor:
        return f"""
import klas_hf  # registers stitched models with transformers
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
prompt = torch.tensor([[3, 4, 5]])  # from the anchors' tokenizer
print(model.generate(prompt, max_new_tokens=20))
"""
    return f"""
import klas_hf  # registers stitched models with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
written = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
print(tokenizer.decode(written[0], skip_special_tokens=True))
"""


def decoder(repo_id: str, processor: bool) -> str:
    """Hidden states of a decoder without a head."""
    return f"""
import klas_hf  # registers stitched models with transformers
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{repo_id}")
token_ids = torch.tensor([[3, 4, 5]])  # from the anchors' tokenizer
print(model(token_ids).last_hidden_state.shape)
"""


def classifier(height: int, width: int) -> Code:
    """The class of an image of this size."""

    def code(repo_id: str, processor: bool) -> str:
        if not processor:
            return f"""
import klas_hf  # registers stitched models with transformers
import torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{repo_id}")
pixels = torch.zeros(1, model.config.num_channels, {height}, {width}, dtype=model.dtype)  # your normalised image
print(model.config.id2label[model(pixels).logits.argmax().item()])
"""
        return f"""
import klas_hf  # registers stitched models with transformers
from PIL import Image
from transformers import pipeline

classify = pipeline("image-classification", "{repo_id}")
image = Image.new("RGB", ({width}, {height}))  # or yours: Image.open("picture.jpg")
print(classify(image))
"""

    return code


def backbone(height: int, width: int) -> Code:
    """Feature maps of an image of this size."""

    def code(repo_id: str, processor: bool) -> str:
        return f"""
import torch
from klas_hf import StitchedBackbone

model = StitchedBackbone.from_pretrained("{repo_id}")
pixels = torch.zeros(1, model.config.num_channels, {height}, {width}, dtype=model.dtype)  # your normalised image
print([tuple(features.shape) for features in model(pixels).feature_maps])
"""

    return code


def segmenter(model_class: str, height: int, width: int) -> Code:
    """The classes of the pixels of an image of this size."""

    def code(repo_id: str, processor: bool) -> str:
        if processor:
            return f"""
import klas_hf  # registers stitched backbones with transformers
from PIL import Image
from transformers import pipeline

segment = pipeline("image-segmentation", "{repo_id}")
image = Image.new("RGB", ({width}, {height}))  # or yours: Image.open("picture.jpg")
print([found["label"] for found in segment(image, subtask="semantic")])
"""
        return f"""
import klas_hf  # registers stitched backbones with transformers
import torch
from transformers import {model_class}

model = {model_class}.from_pretrained("{repo_id}")
pixels = torch.zeros(1, 3, {height}, {width}, dtype=model.dtype)  # your normalised image
print(model(pixels).keys())
"""

    return code


def supernet(path: str) -> Code:
    """One path as a model of its own."""

    def code(repo_id: str, processor: bool) -> str:
        return f"""
from klas_hf import StitchedSupernet

supernet = StitchedSupernet.from_pretrained("{repo_id}")
for path, cost in zip(supernet.paths, supernet.path_costs):
    print(path, cost.macs)
model = supernet.extract("{path}")  # an ordinary stitched model: generate, pipeline, save_pretrained
print(type(model).__name__)
"""

    return code


def probes(name: str) -> Code:
    """Probes of this class, loaded."""

    def code(repo_id: str, processor: bool) -> str:
        return f"""
from klas_hf import {name}

probes = {name}.from_pretrained("{repo_id}")
print(probes.config)  # then score_stitches(source, target, batches, probes=(probes, …))
"""

    return code


def scores(repo_id: str, processor: bool) -> str:
    """The best stitches by the scores."""
    return f"""
from klas_hf import StitchScores, select_stitches

scores = StitchScores.from_pretrained("{repo_id}")
for stitch in select_stitches(scores, buckets=5):  # then StitchedModel.from_anchors(source, target, stitch, …)
    print(stitch, scores.value_of(stitch))
"""
