"""`generate` on our model against transformers' Mixtral with the same weights, token by token."""

import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

DECIDED = {"initializer_range": 0.3, "max_position_embeddings": 512}  # weights under which no two tokens nearly tie
WINDOWS = {"no window": {}, "a window": {"sliding_window": 9}}


def prompt(length=24):
    """Three rows, the last two padded on the left."""
    ids, mask = torch.randint(3, 128, (3, length)), torch.ones(3, length, dtype=torch.long)
    for row, padding in ((1, length // 3), (2, length - 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


def generate(model, **arguments):
    torch.manual_seed(7)
    return model.generate(**arguments)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "three samples a row": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "static cache, beams": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "chunked prompt": {"do_sample": False, "prefill_chunk_size": 5},
    "from the prompt's own tokens": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate_equals_transformers(make_pair, mode, window):
    theirs, ours = make_pair(**DECIDED, **WINDOWS[window])
    arguments = {**prompt(), "max_new_tokens": 16, **MODES[mode]}
    if "prompt_lookup_num_tokens" in arguments:  # takes one row
        arguments |= {"input_ids": arguments["input_ids"][:1], "attention_mask": arguments["attention_mask"][:1]}
    expected = generate(theirs, **arguments)
    assert expected.shape[1] > 24
    assert torch.equal(generate(ours, **arguments), expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hundred_tokens_past_a_window_of_64_equal_transformers(make_pair, seed):
    torch.manual_seed(seed)
    theirs, ours = make_pair(**DECIDED, sliding_window=64)
    arguments = {**prompt(length=70), "min_new_tokens": 200, "max_new_tokens": 200, "do_sample": False}
    expected = theirs.generate(**arguments)
    assert expected.shape == (3, 270)
    assert torch.equal(ours.generate(**arguments), expected)


@pytest.mark.parametrize("implementation", ["eager", "windowed", "tiled"])
def test_every_backend_generates_the_same_past_the_window(make_model, implementation):
    model = make_model(**DECIDED, sliding_window=9).eval()
    arguments = {**prompt(), "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**arguments, use_cache=False)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate(**arguments), expected)


def test_generation_from_embeddings_equals_transformers(make_pair):
    theirs, ours = make_pair(**DECIDED)
    arguments = prompt()
    embeddings = theirs.model.embed_tokens(arguments.pop("input_ids")).detach()
    arguments |= {"inputs_embeds": embeddings, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


def test_router_logits_in_the_configuration_do_not_disturb_generation(make_model):
    model = make_model(**DECIDED).eval()
    arguments = {**prompt(), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**arguments)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(**arguments), expected)


def test_tokens_are_streamed_one_by_one_as_they_are_made(make_model):
    model = make_model(**DECIDED).eval()
    forwards, seen = [], []
    model.model.register_forward_hook(lambda *_: forwards.append(1))

    class Streamer(BaseStreamer):
        def put(self, value):
            seen.append((len(forwards), value.flatten().tolist()))

        def end(self):
            seen.append("end")

    ids = torch.randint(3, 128, (1, 5))
    (whole,) = model.generate(ids, max_new_tokens=6, do_sample=False, streamer=Streamer()).tolist()
    tokens = [(step + 1, [token]) for step, token in enumerate(whole[5:])]
    assert seen == [(0, whole[:5]), *tokens, "end"]


def test_streamed_text_is_the_generated_text(make_model):
    model = make_model(**DECIDED).eval()
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = torch.randint(3, 128, (1, 5))
    arguments = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False}
    expected = tokenizer.decode(model.generate(**arguments)[0, 5:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 3
