"""A trained classifier on held-out rows, beside the majority's class, words counted, and a probe of its base.

usage: python -m bench.classify [--data runs/data/tweets] [--base runs/demo/export] [--json FILE] EXPORT ...

The last is a linear layer trained on the base model's last hidden state of each text, its weights frozen: what a
classifier must at least be worth. All figures are of the same held-out rows, through transformers' own classes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROWS = 64  # at a time
LENGTH = 128  # tokens, as in the recipe


def read(path: Path) -> tuple[list[str], list[str]]:
    """Reads texts and labels."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows], [row["label"] for row in rows]


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Runs a model on texts, those of like length together; returns logits, or the last token's hidden state."""
    tokenizer.padding_side = "right"
    all_ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    order = np.argsort([len(ids) for ids in all_ids], kind="stable")
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(texts), ROWS):
        chosen = order[start : start + ROWS]
        given = tokenizer.pad({"input_ids": [all_ids[row] for row in chosen]}, return_tensors="pt")
        output = model(**given)
        if hasattr(output, "logits"):
            values = output.logits
        else:
            values = output.last_hidden_state[torch.arange(len(chosen)), given["attention_mask"].sum(dim=1) - 1]
        found |= dict(zip(chosen.tolist(), values.float().numpy(), strict=True))
    return np.stack([found[row] for row in range(len(texts))])


def words_counted(training: tuple[list[str], list[str]], texts: list[str]) -> np.ndarray:
    """Predicts by TF-IDF of words and pairs of them, and a linear support vector machine."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LinearSVC(C=0.3))
    found: np.ndarray = model.fit(*training).predict(texts)
    return found


def probe(base: Path, training: tuple[list[str], list[str]], texts: list[str]) -> np.ndarray:
    """Predicts by a logistic regression on the base model's last hidden states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model_of_features = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model_of_features.fit(outputs(model, tokenizer, training[0]), training[1])
    found: np.ndarray = model_of_features.predict(outputs(model, tokenizer, texts))
    return found


def trained(export: Path, texts: list[str]) -> np.ndarray:
    """Predicts by a run's export, as transformers reads it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    logits = outputs(model, transformers.AutoTokenizer.from_pretrained(export), texts)
    return np.asarray([model.config.id2label[number] for number in logits.argmax(axis=-1).tolist()])


def main() -> None:
    """Prints accuracy and macro F1 of each."""
    from sklearn.metrics import accuracy_score, f1_score

    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("exports", type=Path, nargs="+", help="of runs of recipe=classify_tiny")
    words.add_argument("--data", type=Path, default=Path("runs/data/tweets"))
    words.add_argument("--base", type=Path, default=Path("runs/demo/export"))
    words.add_argument("--json", type=Path)
    arguments = words.parse_args()
    training, (texts, labels) = (read(arguments.data / f"{name}.jsonl") for name in ("train", "held_out"))
    names, counts = np.unique(training[1], return_counts=True)
    predictions = {
        "the majority's class": np.full(len(labels), names[counts.argmax()]),
        "TF-IDF and a linear SVM": words_counted(training, texts),
        "a linear probe of the base, frozen": probe(arguments.base, training, texts),
        **{str(export): trained(export, texts) for export in arguments.exports},
    }
    figures = {
        name: {"accuracy": accuracy_score(labels, said), "macro_f1": f1_score(labels, said, average="macro")}
        for name, said in predictions.items()
    }
    print(f"{len(training[0]):,} rows to train on, {len(texts):,} held out\n\n{'':<38} accuracy  macro F1")
    for name, row in figures.items():
        print(f"{name:<38} {row['accuracy']:>8.4f}  {row['macro_f1']:>8.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
