"""The end of a run: summary, export, and a sample of what the model writes."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mixtral import MixtralForCausalLM
from train.config import Config
from train.data.loader import Data
from train.export import export
from train.folder import RunFolder
from train.observe.observer import Observer
from train.parallel.engine import Engine


def finish(
    folder: RunFolder,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: Config,
    observer: Observer,
) -> None:
    """Writes `summary.json` and `export/`, then prints a sample; the main process's part alone."""
    observer.end_of_training()
    model = engine.module
    summary = summarise(observer)
    folder.write_json("summary.json", summary)
    export(folder.path / "export", model, tokenizer, data.held_out_documents, config, summary)
    print(
        f"held-out loss {summary['first_eval_loss']:.4f} -> {summary['eval_loss']:.4f}; "
        f"exported to {folder.path / 'export'}"
    )
    if config.evaluate.sample_tokens:
        text = sample(model, tokenizer, config.evaluate.sample_prompt, config.evaluate.sample_tokens, config.run.seed)
        print(f"--- sample ---\n{text}\n--------------")


def summarise(observer: Observer) -> dict[str, Any]:
    """Gathers the figures a run is remembered by."""
    last = observer.last
    names = ("loss", "eval_loss", "eval_perplexity", "router_loss", "tokens_per_second", "peak_memory_bytes")
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "first_eval_loss": observer.evaluations[0],
        **{name: last[name] for name in names},
    }


@torch.no_grad()
def sample(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int) -> str:
    """Writes `tokens` tokens after a prompt, drawn from the 20 likeliest at each step, the same for a seed."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    prompt_ids = torch.tensor([ids or [tokenizer.eos_token_id]], device=model.device)
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=20,
            temperature=0.7,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0], skip_special_tokens=True)
