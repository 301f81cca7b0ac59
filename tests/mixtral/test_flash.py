"""What flash attention is handed, through transformers' own call path, and computes by its documentation.

The kernels need a GPU. Here their documented semantics, written out, stand behind transformers' loader; on a GPU the
kernels themselves are compared.
"""

import pytest
import torch
import transformers.modeling_flash_attention_utils as loader
from transformers import StaticCache

from tests.conftest import logits_in_parts

HALF = torch.float16  # of the two half precisions the one with more digits
TOLERANCE = 1e-2  # of the largest logit: a few roundings of 2**-11 per layer, through three layers
SHORT = {"sliding_window": 5}
ATTENTION_DECIDES = {"initializer_range": 0.2, "num_local_experts": 1, "num_experts_per_tok": 1}  # no routing can flip


def attend(q, k, v, softmax_scale, causal, window_size):
    """One sequence, (S, heads, D): `flash_attn_func`'s docstring, word by word.

    Key/value heads serve consecutive query heads. "If causal=True, the causal mask is aligned to the bottom right
    corner". "Query at position i will only attend to keys between [i + seqlen_k - seqlen_q - window_size[0],
    i + seqlen_k - seqlen_q + window_size[1]] inclusive", -1 being without limit. A row that sees nothing is zero.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).float() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * softmax_scale
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))[None, :]
    seen = torch.ones_like(at + key, dtype=torch.bool)
    if causal:
        seen &= key <= at
    if window_size[0] >= 0:
        seen &= key >= at - window_size[0]
    if window_size[1] >= 0:
        seen &= key <= at + window_size[1]
    probabilities = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", probabilities, v).to(q.dtype)


class Flash:
    """The documented functions, which keep what they are handed."""

    def __init__(self):
        self.calls = []

    def fixed(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert q.dtype in (torch.float16, torch.bfloat16)
        self.calls.append({"scale": softmax_scale, "causal": causal, "window": window_size, "borders": None})
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        for borders, longest, states in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert borders[0] == 0
            assert borders[-1] == len(states)
            assert borders.diff().max() == longest
        self.calls.append(
            {"scale": softmax_scale, "causal": causal, "window": window_size, "borders": cu_seqlens_q.tolist()}
        )
        lengths = [borders.diff().tolist() for borders in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
        parts = [states.split(length) for states, length in zip((q, k, v), lengths, strict=True)]
        return torch.cat([attend(*part, softmax_scale, causal, window_size) for part in zip(*parts, strict=True)])


def third(flash):
    """The same as flash-attn 3 offers it: without dropout."""

    def fixed(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return flash.fixed(q, k, v, 0.0, softmax_scale, causal, window_size)

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flash.varlen(q, k, v, *lengths, 0.0, softmax_scale, causal, window_size)

    return fixed, varlen


def without_window(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
    """The signature of flash-attn before 2.3."""


@pytest.fixture
def flash(monkeypatch):
    flash = Flash()
    kernels = {"flash_attention_2": (flash.fixed, flash.varlen), "flash_attention_3": third(flash)}
    kernels["old"] = (without_window, without_window)

    def load(implementation, *_args, **_kwargs):
        name = "old" if flash.old else implementation
        return *kernels[name], None, loader._pad_input, loader._unpad_input

    flash.old = False
    monkeypatch.setattr(loader, "_lazy_imports", load)
    monkeypatch.setattr(loader, "_loaded_implementation", None)
    return flash


def ids(rows=2, length=24):
    return torch.randint(3, 128, (rows, length))


def mask(side):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(17, 24)] = 0
    return mask


PACKED = torch.stack(
    [torch.cat([torch.arange(9), torch.arange(15)]), torch.cat([torch.arange(4, 20), torch.arange(8)])]
)
INPUTS = {
    "plain": (dict, None),
    "left padding": (lambda: {"attention_mask": mask("left")}, [0, 17, 41]),
    "right padding": (lambda: {"attention_mask": mask("right")}, [0, 17, 41]),
    "packed rows": (lambda: {"position_ids": PACKED}, [0, 9, 24, 40, 48]),
    "one packed row": (lambda: {"input_ids": ids(1), "position_ids": PACKED[1:]}, [0, 16, 24]),
    "own positions": (lambda: {"position_ids": torch.arange(3, 27).unsqueeze(0)}, [0, 24, 48]),
}


@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_handed_what_makes_it_equal_sdpa(flash, make_model, name, inputs, window):
    model = make_model(HALF, sliding_window=window, head_dim=12, **ATTENTION_DECIDES).eval()
    make_inputs, borders = INPUTS[inputs]
    arguments = {"input_ids": ids(), "use_cache": False, **make_inputs()}
    expected = model(**arguments).logits
    model.config._attn_implementation = name
    got = model(**arguments).logits
    real = arguments.get("attention_mask", torch.ones(expected.shape[:2])).bool()
    assert (got - expected)[real].abs().max() <= TOLERANCE * expected.abs().max()
    assert len(flash.calls) == 3
    for call in flash.calls:
        assert call["scale"] == pytest.approx(12**-0.5)
        assert call["causal"] is True
        assert call["window"][0] == (4 if window == 5 else -1)  # W - 1 before the query; the causal mask ends it
        assert call["borders"] == borders


def test_gradients_through_packed_rows_and_a_window_equal_sdpas(flash, make_model):
    model = make_model(HALF, **SHORT, **ATTENTION_DECIDES)
    arguments = {"input_ids": ids(), "position_ids": PACKED, "labels": ids()}
    model(**arguments).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    largest = max(gradient.norm() for gradient in expected.values())
    model.zero_grad()
    model.config._attn_implementation = "flash_attention_2"
    model(**arguments).loss.backward()
    assert flash.calls
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 2e-2 * max(expected[name].norm(), 1e-2 * largest), name


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_with_a_cache_equal_a_full_recomputation(flash, make_model, window, static):
    model = make_model(HALF, sliding_window=window, **ATTENTION_DECIDES).eval()
    input_ids, visible = ids(), mask("left")
    positions = (visible.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids, attention_mask=visible, position_ids=positions, use_cache=False).logits
    model.config._attn_implementation = "flash_attention_2"
    past = StaticCache(config=model.config, max_cache_len=24) if static else None
    spans = ((0, 10), (10, 13), *((at, at + 1) for at in range(13, 24)))
    got = logits_in_parts(model, input_ids, visible, spans, past)
    assert (got - expected)[visible.bool()].abs().max() <= TOLERANCE * expected.abs().max()


def test_a_static_cache_without_a_mask_is_refused(flash, make_model):
    model = make_model(HALF)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention_mask beside a static cache"):
        model(ids(), past_key_values=StaticCache(config=model.config, max_cache_len=30))


def test_everything_that_is_missing_is_said_in_one_error(flash, make_model):
    model = make_model(torch.float32, sliding_window=5, attention_dropout=0.1)
    model.config._attn_implementation = "flash_attention_2"
    flash.old = True
    with pytest.raises(ValueError, match=r"'flash_attention_2' needs half precision, .*; and flash-attn >= 2\.3 for"):
        model(ids())
    flash.old = False
    loader._loaded_implementation = None
    model.half()(ids())
    model.config._attn_implementation = "flash_attention_3"
    with pytest.raises(ValueError, match="'flash_attention_3' needs attention_dropout=0, not 0.1"):
        model(ids())


def test_autocast_is_half_precision_enough(flash, make_model):
    model = make_model(torch.float32, **ATTENTION_DECIDES).eval()
    input_ids = ids()
    expected = model(input_ids).logits
    model.config._attn_implementation = "flash_attention_2"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(input_ids).logits
    assert flash.calls
    assert (got - expected).abs().max() <= 8e-2 * expected.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where flash-attn is missing")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_without_flash_attn_all_that_it_needs_is_said_at_once(make_model, name):
    with pytest.raises(ImportError, match=rf"{name}.*>= 2.3 for a sliding_window.*GPU and half precision"):
        make_model(attn_implementation=name)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_the_kernel_itself_equals_sdpa(make_model, name, package, inputs, window):
    pytest.importorskip(package)
    model = make_model(torch.bfloat16, sliding_window=window, head_dim=32, **ATTENTION_DECIDES).cuda().eval()
    arguments = {"input_ids": ids(), **INPUTS[inputs][0]()}
    arguments = {name: value.cuda() for name, value in arguments.items()}
    expected = model(**arguments, use_cache=False).logits
    model.set_attn_implementation(name)
    got = model(**arguments, use_cache=False).logits
    real = arguments.get("attention_mask", torch.ones(expected.shape[:2])).bool()
    assert (got - expected)[real].abs().max() <= 8 * TOLERANCE * expected.abs().max()  # 3 digits fewer
