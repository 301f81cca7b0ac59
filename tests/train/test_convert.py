"""The verb `convert`: whole folders, or nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mixtral import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel
from tests.conftest import SIZES
from tests.mixtral.test_weights_raw import raw_tensors, write
from train.cli import main
from train.data.tokenizer import INSTRUCT_TEMPLATE, mixtral_model, mixtral_tokenizer

TEXTS = ["Hello world, Mixtral!", " leading space", "two  spaces", "漢字 👩‍🚀\n", "</s> is text"]
PYTHON = (sys.executable, "-m", "train.convert")


def convert(source, target, *words):
    return main(["convert", "--input_dir", str(source), "--output_dir", str(target), *words])


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def hub(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw", "fused", raw_tensors())


def ids(tokenizer):
    return tokenizer(TEXTS, split_special_tokens=True)["input_ids"]


def test_a_raw_folder_gives_a_tokenizer_that_is_reloaded_exactly(tmp_path):
    params = {"vocab_size": 32000, "dim": 8, "n_layers": 1, "head_dim": 4, "hidden_dim": 8, "n_heads": 2}
    params |= {"n_kv_heads": 2, "norm_eps": 1e-5, "moe": {"num_experts": 2, "num_experts_per_tok": 1}}
    raw = write(tmp_path / "raw", "experts", raw_tensors(params), params)
    (raw / "tokenizer.model").write_bytes(mixtral_model())
    assert convert(raw, tmp_path / "base") == 0
    assert convert(raw, tmp_path / "instruct", "--instruct") == 0
    for name in ("base", "instruct"):
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert ids(again) == ids(mixtral_tokenizer())
        assert again.chat_template == (INSTRUCT_TEMPLATE if name == "instruct" else None)
        assert (again.bos_token_id, again.eos_token_id) == (1, 2)
    assert convert(tmp_path / "instruct", tmp_path / "again", "--dtype", "bfloat16") == 0
    carried = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert carried.chat_template == INSTRUCT_TEMPLATE
    assert ids(carried) == ids(mixtral_tokenizer())
    assert convert(tmp_path / "again", tmp_path / "back", "--to", "mistral") == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == mixtral_model()


def test_a_lone_sentencepiece_file_on_the_hub_is_built_and_keeps_its_template(tmp_path, make_model, capsys):
    make_model(vocab_size=32000).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.model").write_bytes(mixtral_model())
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "hub" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert convert(tmp_path / "hub", tmp_path / "out") == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ids(again) == ids(mixtral_tokenizer())
    assert again.chat_template == settings["chat_template"]
    (tmp_path / "hub" / "added_tokens.json").write_text('{"<pad>": 32000}')
    capsys.readouterr()
    assert convert(tmp_path / "hub", tmp_path / "other") == 4
    assert "added_tokens.json without tokenizer.json" in error_of(capsys)


def test_a_broken_tokenizer_is_named(tmp_path, hub, capsys):
    (hub / "tokenizer.json").write_text("{")
    assert convert(hub, tmp_path / "out", "--instruct") == 4
    assert "--instruct: the tokenizer in" in error_of(capsys)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, raw, capsys):
    (raw / "tokenizer.model").write_bytes(mixtral_model())
    assert convert(raw, tmp_path / "out") == 4
    assert "tokenizer.model has 32000 tokens, but the embedding only 128 rows" in error_of(capsys)
    (raw / "tokenizer.model").write_bytes(b"no model")
    assert convert(raw, tmp_path / "out") == 4
    assert "tokenizer.model: not a sentencepiece model" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("bound", [None, "30KB"])
def test_hub_to_hub_casts_and_cuts_shards_and_keeps_the_rest(tmp_path, hub, bound):
    (hub / "generation_config.json").write_text('{"do_sample": true}')
    words = ["--max_shard_size", bound] if bound else []
    assert convert(hub, tmp_path / "out", "--dtype", "bfloat16", *words) == 0
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (tmp_path / "out", hub)
    )
    assert found.dtype == torch.bfloat16
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in found.state_dict().items())
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) > 3 if bound else 1
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"do_sample": true}'
    assert found.config.architectures == ["MixtralForCausalLM"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_k", "2"], "--top_k belongs to --upcycle"),
        (["--upcycle", "4", "--top_k", "5"], "--top_k=5 must lie between 1 and --upcycle=4"),
        (["--upcycle", "4", "--top_k", "0"], "--top_k=0 must lie between 1 and --upcycle=4"),
        (["--upcycle", "4", "--noise", "nan"], "--noise=nan must be 0 or more"),
        (["--upcycle", "4", "--noise", "-1"], "--noise=-1.0 must be 0 or more"),
        (["--upcycle", "4", "--seed", "-1"], "--seed=-1 must lie between"),
        (["--instruct", "--to", "mistral"], "--instruct needs --to=hub"),
        (["--instruct"], "--instruct: .*hub holds no tokenizer to give a template"),
    ],
    ids=str,
)
def test_words_that_do_not_go_together_are_refused(tmp_path, hub, words, message, capsys):
    assert convert(hub, tmp_path / "out", *words) == 2
    assert re.search(message, error_of(capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("words", [["--to", "ggml"], ["--max_shard_size", "big"], ["--max_shard_size", "0GB"], ["--x"]])
def test_unknown_words_end_with_code_two(tmp_path, hub, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert(hub, tmp_path / "out", *words)
    assert words[-1] in capsys.readouterr().err


def test_inputs_and_outputs_that_cannot_be_used_have_their_exit_codes(tmp_path, hub, capsys):
    assert convert(tmp_path / "nothing", tmp_path / "out") == 2
    assert "nothing is not a folder" in error_of(capsys)
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty", tmp_path / "out") == 4
    assert "empty holds neither model*.safetensors" in error_of(capsys)
    assert convert(hub, hub) == 2
    assert "hub exists already: name another folder" in error_of(capsys)
    (tmp_path / "file").write_text("x")
    assert convert(hub, tmp_path / "file" / "out") == 6
    assert "file" in error_of(capsys)
    (hub / "model.safetensors").write_bytes((hub / "model.safetensors").read_bytes()[:-1])
    assert convert(hub, tmp_path / "out") == 4
    assert "model.safetensors has" in error_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "hub"]


def test_a_place_where_a_disk_is_mounted_is_refused_before_anything_is_converted(tmp_path, hub):
    mounted = ["unshare", "--map-root-user", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    (tmp_path / "out").mkdir()
    if subprocess.run([*mounted, tmp_path / "out", "true"], capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    words = ["--input_dir", str(hub), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*mounted, tmp_path / "out", *PYTHON, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: --output_dir: {tmp_path / 'out'} is where a disk is mounted: name a folder in it\n"
    assert " left" not in done.stdout  # no tensor was written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]


def test_mistakes_that_need_no_torch_are_found_without_it(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    for source, target in ((tmp_path / "empty", tmp_path / "out"), (hub, hub)):
        words = ["convert", "--input_dir", str(source), "--output_dir", str(target)]
        code = f"import sys; from train.cli import main; code = main({words!r}); assert 'torch' not in sys.modules; "
        done = subprocess.run([sys.executable, "-c", f"{code} sys.exit(code)"], capture_output=True, text=True)
        assert done.returncode in (2, 4), done.stderr


def test_settings_that_the_raw_format_cannot_hold_are_named(tmp_path, make_model, capsys):
    make_model(eos_token_id=[2, 5], pad_token_id=0).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "generation_config.json").write_text("{}")
    capsys.readouterr()
    assert convert(tmp_path / "hub", tmp_path / "raw", "--to", "mistral") == 0
    assert "not kept" in (said := capsys.readouterr().out)
    assert "eos_token_id=[2, 5], pad_token_id=0, generation_config.json" in said
    assert convert(tmp_path / "hub", tmp_path / "again") == 0
    assert "not kept" not in capsys.readouterr().out


def test_a_classifier_stays_one_and_does_not_fit_the_raw_format(tmp_path, capsys):
    model = MixtralForSequenceClassification(MixtralConfig(**SIZES, num_labels=3, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "hub")
    assert convert(tmp_path / "hub", tmp_path / "out") == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    input_ids = torch.randint(1, 128, (2, 9))
    with torch.no_grad():
        assert (theirs(input_ids).logits - model(input_ids).logits).abs().max() <= 1e-6
    capsys.readouterr()
    assert convert(tmp_path / "hub", tmp_path / "raw", "--to", "mistral") == 4
    assert "hub is no causal language model" in error_of(capsys)


@pytest.mark.parametrize("kind", [MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel])
def test_the_parameters_that_are_counted_are_those_that_are_there(tmp_path, capsys, kind):
    model = kind(MixtralConfig(**SIZES, num_labels=3))
    model.save_pretrained(tmp_path / "hub")
    assert convert(tmp_path / "hub", tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert f": {sum(parameter.numel() for parameter in model.parameters()):,} parameters" in said


@pytest.mark.slow
def test_a_full_disk_ends_with_code_six_and_leaves_nothing(tmp_path, hub):
    words = ["--input_dir", str(hub), "--output_dir", str(tmp_path / "out")]
    limited = f"ulimit -f 100; exec {' '.join(PYTHON)} {' '.join(words)}"  # blocks of 1 KB: a write fails half-way
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; {limited}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 6, done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_killed_conversion_leaves_a_hidden_folder_that_the_next_replaces(tmp_path):
    config = MixtralConfig(**SIZES | {"intermediate_size": 2048, "num_hidden_layers": 12})
    MixtralForCausalLM(config).save_pretrained(tmp_path / "hub", max_shard_size="1MB")
    words = ["--input_dir", str(tmp_path / "hub"), "--output_dir", str(tmp_path / "out"), "--max_shard_size", "1MB"]
    process = subprocess.Popen([*PYTHON, *words], stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.endswith(" left\n"))  # a tenth is done
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "hub"]
    (tmp_path / ".out.partial" / "left-over").write_text("x")
    assert convert(tmp_path / "hub", tmp_path / "out", "--max_shard_size", "1MB") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]
    assert not (tmp_path / "out" / "left-over").exists()
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "hub", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_progress_is_plain_lines_without_a_terminal(tmp_path, hub, capsys):
    assert convert(hub, tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith(" s left")]) in range(5, 11)
    assert "parameters" in lines[-1]


def test_help_answers_at_once_without_torch():
    code = (
        "import sys, train.cli\n"
        "try: train.cli.main(['convert', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    seconds = []
    for _ in range(3):  # the best of them, for a busy machine
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        assert "--input_dir" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.slow
def test_a_conversion_never_holds_much_more_than_its_largest_tensor(tmp_path):
    """Peak memory of a process that converts six layers, above that of one that converts a tiny one."""
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
    peaks = {}
    for name, changes in {"small": {"num_hidden_layers": 1, "hidden_size": 32}, "large": {}}.items():
        MixtralForCausalLM(MixtralConfig(**sizes | changes)).save_pretrained(tmp_path / name)
        words = ["--input_dir", str(tmp_path / name), "--output_dir", str(tmp_path / f"{name}-out")]
        code = (
            "import re\nfrom train.convert import main\n"
            f"assert main({[*words, '--to', 'mistral-fused', '--dtype', 'float16']}) == 0\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1]) * 1024
    group = 4 * 8 * 2 * 1024 * 512  # fp32 gate_up_proj of a layer: the largest tensor in memory
    assert peaks["large"] - peaks["small"] <= 2 * group
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 8 * group
