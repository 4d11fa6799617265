"""What `transformers` makes of random weights: run as a script with it and with `torch`, writes `golden_bert.json`."""

import importlib
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
}
CLASSES = {"pooled": "BertModel", "classification": "BertForSequenceClassification", "span": "BertForQuestionAnswering"}
TOKENS = np.array([[2, 5, 7, 9, 3, 11, 4, 3], [2, 6, 3, 8, 3, 0, 0, 0]], np.int32)
ATTENDED = TOKENS > 0
SEGMENTS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]], np.int32)


def weights(shapes):
    """Random arrays by name, from their shapes alone: nothing but the shapes needs to be stored."""
    draw = np.random.RandomState(0)
    found = {}
    for name in sorted(shapes):
        value = draw.normal(size=shapes[name]) * (0.3 if len(shapes[name]) > 1 else 0.1)
        found[name] = (value + name.endswith("LayerNorm.weight")).astype(np.float32)
    return found


def outputs():
    """Shapes of the weights, and outputs, of each class."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    out = {}
    for name, kind in CLASSES.items():
        config = transformers.BertConfig(**SIZES, num_labels=2 if name == "span" else 3)
        model = getattr(transformers, kind)(config).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}
        arrays = {key: torch.tensor(value) for key, value in weights(shapes).items()}
        model.load_state_dict(arrays, strict=False)
        inputs = {"input_ids": TOKENS, "attention_mask": ATTENDED, "token_type_ids": SEGMENTS}
        with torch.no_grad():
            found = model(**{key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()})
        if name == "pooled":
            values = {"pooled": found.pooler_output, "encoder": found.last_hidden_state}
        elif name == "classification":
            values = {"classification": found.logits}
        else:
            values = {"span": torch.stack([found.start_logits, found.end_logits], -1)}
        for key, value in values.items():
            out[key] = {"shapes": shapes, "outputs": np.round(value.double().numpy(), 6).tolist()}
    return out


if __name__ == "__main__":
    FILE.write_text(json.dumps(outputs()) + "\n")
